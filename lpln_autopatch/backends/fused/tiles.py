"""Load, round and store tiles of rows: the functions that the kernels share.

`forward_kernels.py` explains the arguments.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from lpln_autopatch.backends.fused import recovery

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""True if Triton runs the kernels in NumPy, on CPU tensors, for tests without a GPU."""

IN_Y = tl.constexpr(-1)
IN_KEPT = tl.constexpr(-2)

SMALL = tl.constexpr(4)
"""The xhat of a row is small if its variance is less than so many times eps."""

WORST = tl.constexpr(1 / recovery.WORST_RATIO)
FEATURES_PER_SLOT = tl.constexpr(recovery.FEATURES_PER_SLOT)


@triton.jit
def rows(first, ROWS: tl.constexpr):  # 64 bits: a tensor may have more than 2**31 elements
    return (first + tl.arange(0, ROWS)).to(tl.int64)


@triton.jit
def load(p_tensor, b_rows, b_columns, m_tile, inner, outer_stride, inner_stride):
    b_begin = (b_rows // inner) * outer_stride + (b_rows % inner) * inner_stride
    p_tile = p_tensor + b_begin[:, None] + b_columns[None, :]
    return tl.load(p_tile, m_tile, 0.0).to(tl.float32)


@triton.jit
def load_parameter(p_parameter, b_columns, N, if_none: tl.constexpr):
    if p_parameter is None:
        b_value = if_none
    else:
        b_value = tl.load(p_parameter + b_columns, b_columns < N, 0.0).to(tl.float32)[None, :]
    return b_value


@triton.jit
def load_recovery(p_weight, p_bias, p_slots, b_columns, N, rounding, smallest):
    """Load bias, 1 / weight and slot of the features: xhat = (y - bias) / weight."""
    if p_slots is None:
        b_bias, b_inverse, b_slot = 0.0, 1.0, -1
    else:
        b_bias = tl.zeros_like(b_columns).to(tl.float32)[None, :]
        if p_bias is not None:
            b_bias = load_parameter(p_bias, b_columns, N, 0.0)
        b_weight = load_parameter(p_weight, b_columns, N, 1.0)
        # Where y is noise alone 0 is the better guess.
        m_known = tl.abs(b_weight) > rounding * (tl.abs(b_bias) + smallest)
        b_inverse = tl.where(m_known, 1 / tl.where(m_known, b_weight, 1.0), 0.0)
        b_slot = tl.load(p_slots + b_columns, b_columns < N, IN_KEPT)[None, :]
    return b_bias, b_inverse, b_slot


@triton.jit
def load_xhat(
    p_kept, p_statistics, b_bias, b_inverse, b_slot, p_slots, p_reserved,
    b_rows, b_columns, m_tile, M, N, inner, outer_stride, inner_stride,
    CENTRED: tl.constexpr, IS_X: tl.constexpr,
):  # fmt: skip
    b_xhat = load(p_kept, b_rows, b_columns, m_tile, inner, outer_stride, inner_stride)
    if p_slots is not None:
        p_own = p_reserved + b_rows[:, None] * slots_for(N) + b_slot
        b_own = tl.load(p_own, m_tile & (b_slot >= 0), 0.0).to(tl.float32)
        b_xhat = tl.where(b_slot == IN_Y, (b_xhat - b_bias) * b_inverse, b_xhat)
        b_xhat = tl.where(b_slot >= 0, b_own, b_xhat)
    elif IS_X:
        if CENTRED:
            b_xhat -= tl.load(p_statistics + M + b_rows, b_rows < M, 0.0)[:, None]
        b_xhat *= tl.load(p_statistics + b_rows, b_rows < M, 0.0)[:, None]
    return b_xhat


@triton.jit
def store(p_tensor, b_value, b_rows, b_columns, m_tile, N):
    b_offsets = b_rows[:, None] * N + b_columns[None, :]
    tl.store(p_tensor + b_offsets, rounded(b_value, p_tensor.dtype.element_ty), m_tile)


@triton.jit
def rounded(b_value, dtype: tl.constexpr):
    """Round a float32 block to `dtype`: to the nearest, a tie to the even one, as the GPU does."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the lower 16 bits off
        b_bits = b_value.to(tl.uint32, bitcast=True)
        b_nearest = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)).to(tl.float32, bitcast=True)
        b_value = tl.where(b_value == b_value, b_nearest, b_value)
    return b_value.to(dtype)


@triton.jit
def store_results(b_xhat, p_weight, p_bias, p_y, p_kept, b_rows, b_columns, m_tile, N):
    """Store y, and xhat for backward."""
    b_weight = load_parameter(p_weight, b_columns, N, 1.0)
    b_bias = load_parameter(p_bias, b_columns, N, 0.0)
    store(p_y, b_xhat * b_weight + b_bias, b_rows, b_columns, m_tile, N)
    if p_kept is not None:
        store(p_kept, b_xhat, b_rows, b_columns, m_tile, N)


@triton.jit
def store_statistics(p_statistics, b_mean, b_rstd, b_rows, M, WITH_MEAN: tl.constexpr):
    if p_statistics is not None:
        tl.store(p_statistics + b_rows, b_rstd, b_rows < M)
        if WITH_MEAN:
            tl.store(p_statistics + M + b_rows, b_mean, b_rows < M)


@triton.jit
def slots_for(N):
    return tl.cdiv(N, FEATURES_PER_SLOT)


@triton.jit
def is_lost(p_weight, p_bias, b_columns, N, smallest):
    """Return 1 for each feature whose xhat cannot be recovered from y, and 0 for the others."""
    b_weight = tl.load(p_weight + b_columns, b_columns < N, 1.0).to(tl.float32)
    b_bias = tl.zeros_like(b_weight)
    if p_bias is not None:
        b_bias = tl.load(p_bias + b_columns, b_columns < N, 0.0).to(tl.float32)
    return (tl.abs(b_weight) < WORST * (tl.abs(b_bias) + smallest)).to(tl.int32)


@triton.jit
def choose_slots(
    p_x, p_weight, p_bias, p_kept, p_slots, p_reserved, p_counts, p_next,
    b_mean, b_variance, b_rstd, b_rows, M, N, eps, smallest,
    inner, outer_stride, inner_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the slot of each feature, store the xhat of those that have one, and count.

    All programs choose, and the first one stores the slots. In few norms a feature needs one.
    """
    if p_slots is not None:
        b_lost = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, N, BLOCK):
            b_columns = begin + tl.arange(0, BLOCK)
            b_lost += is_lost(p_weight, p_bias, b_columns, N, smallest)
        lost = tl.sum(b_lost, 0)
        if p_kept is None and lost > 0:
            store_reserved(
                p_x, p_weight, p_bias, p_slots, p_reserved, b_mean, b_rstd, b_rows,
                M, N, smallest, inner, outer_stride, inner_stride,
                BLOCK // 8 if BLOCK >= 8 else 1,  # of a whole tile there were too many registers
            )  # fmt: skip
        elif tl.program_id(0) == 0:
            for begin in range(0, N, BLOCK):
                b_columns = begin + tl.arange(0, BLOCK)
                b_slot = tl.zeros((BLOCK,), tl.int32) + (IN_Y if p_kept is None else IN_KEPT)
                tl.store(p_slots + b_columns, b_slot, b_columns < N)
        if tl.program_id(0) == 0:
            tl.store(p_counts, lost)
            tl.store(p_next + 1, 0)
        if p_bias is not None:  # else y is xhat but for its scale: as exact where xhat is small
            m_small = (b_rows < M) & (b_variance < SMALL * eps)
            small = tl.sum(m_small.to(tl.int32), 0)
            # The order of whole numbers makes no difference.
            tl.atomic_add(p_counts + 1, small, small > 0, sem="relaxed")


@triton.jit
def store_reserved(
    p_x, p_weight, p_bias, p_slots, p_reserved, b_mean, b_rstd, b_rows,
    M, N, smallest, inner, outer_stride, inner_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the slots, and of the rows the xhat of the features that have one: x is read again."""
    before = tl.zeros((), tl.int32)
    for begin in range(0, N, BLOCK):
        b_columns = begin + tl.arange(0, BLOCK)
        b_lost = is_lost(p_weight, p_bias, b_columns, N, smallest)
        b_slot = before + tl.cumsum(b_lost, 0) - 1
        b_slot = tl.where((b_lost > 0) & (b_slot < slots_for(N)), b_slot, IN_Y)
        before += tl.sum(b_lost, 0)
        m_own = (b_rows < M)[:, None] & (b_slot >= 0)[None, :]
        b_x = load(p_x, b_rows, b_columns, m_own, inner, outer_stride, inner_stride)
        b_xhat = (b_x - b_mean[:, None]) * b_rstd[:, None]
        p_own = p_reserved + b_rows[:, None] * slots_for(N) + b_slot[None, :]
        tl.store(p_own, rounded(b_xhat, p_reserved.dtype.element_ty), m_own)
        if tl.program_id(0) == 0:
            tl.store(p_slots + b_columns, b_slot, b_columns < N)
