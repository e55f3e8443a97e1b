"""Tiles of rows, as the kernels load, round and store them. `kernels.py` explains the arguments."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton runs these kernels in NumPy, on CPU tensors, for tests without a GPU."""


@triton.jit
def rows(first, ROWS: tl.constexpr):  # 64 bits: a tensor may have more than 2**31 elements
    return (first + tl.arange(0, ROWS)).to(tl.int64)


@triton.jit
def load(tensor, rows, columns, mask, inner, outer_stride, inner_stride):
    begin = (rows // inner) * outer_stride + (rows % inner) * inner_stride
    return tl.load(tensor + begin[:, None] + columns[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def load_parameter(parameter, columns, N, if_none: tl.constexpr):
    if parameter is None:
        value = if_none
    else:
        value = tl.load(parameter + columns, columns < N, 0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def load_slots(recovery, columns, N):
    return tl.load(recovery + 2 * N + columns, columns < N, -1.0).to(tl.int32)[None, :]


@triton.jit
def load_recovery(recovery, columns, N):
    if recovery is None:
        offset, one_over, slot = 0.0, 1.0, -1
    else:
        offset = load_parameter(recovery, columns, N, 0.0)
        one_over = load_parameter(recovery + N, columns, N, 0.0)
        slot = load_slots(recovery, columns, N)
    return offset, one_over, slot


@triton.jit
def store(tensor, value, rows, columns, mask, N):
    offsets = rows[:, None] * N + columns[None, :]
    tl.store(tensor + offsets, rounded(value, tensor.dtype.element_ty), mask)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """`value`, float32, in `dtype`: to the nearest, a tie to the even one, as the GPU rounds."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the lower 16 bits off
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(dtype)


@triton.jit
def store_statistics(statistics, mean, rstd, rows, M):
    if statistics is not None:
        tl.store(statistics + rows, mean, rows < M)
        tl.store(statistics + M + rows, rstd, rows < M)


@triton.jit
def reserve(recovery, reserved, xhat, rows, columns, mask, N, RESERVED):
    slot = load_slots(recovery, columns, N)
    value = rounded(xhat, reserved.dtype.element_ty)
    tl.store(reserved + rows[:, None] * RESERVED + slot, value, mask & (slot >= 0))


@triton.jit
def load_xhat(
    x, statistics, offset, one_over, slot, reserved, rows, columns, mask, M, RESERVED,
    inner, outer_stride, inner_stride, IS_XHAT: tl.constexpr,
):  # fmt: skip
    xhat = load(x, rows, columns, mask, inner, outer_stride, inner_stride)
    if reserved is not None:
        own = reserved + rows[:, None] * RESERVED + slot
        own = tl.load(own, mask & (slot >= 0), 0.0).to(tl.float32)
        xhat = tl.where(slot >= 0, own, (xhat - offset) * one_over)
    elif not IS_XHAT:
        mean = tl.load(statistics + rows, rows < M, 0.0)
        rstd = tl.load(statistics + M + rows, rows < M, 0.0)
        xhat = (xhat - mean[:, None]) * rstd[:, None]
    return xhat
