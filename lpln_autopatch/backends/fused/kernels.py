"""The Triton kernels of the backend "fused".

Each works on tiles of ROWS rows. Where a row fits into one block, a tile is held in registers from
its one read to its one write; the `_looped` kernels go over a longer row in blocks, twice. All is
read in its own dtype, computed with in float32, and rounded once, on writing.

Arguments that several kernels share:
    M, N: Rows, and features in each.
    statistics: float32, shape (2, M): mean, and 1 / sqrt(variance + eps).
    kept: xhat = (x - mean) / sqrt(variance + eps), rounded: backward takes it for x if IS_XHAT.
    recovery, reserved: how backward gets xhat from y, which it takes for x if they are there.
        recovery: float32, shape (3 * N + 1,): shift, inverse and slot of each feature, and the
        number of those that are lost. xhat = (y - shift) * inverse; but if slot is not negative,
        it lies there, rounded, in the row's RESERVED elements of reserved, shape (M, RESERVED).
        ../lean/recovery.py says why.
    *_inner, *_outer_stride, *_inner_stride: row r begins at element
        (r // inner) * outer_stride + (r % inner) * inner_stride.
    partials: float32, shape (2, programs, N): what each program has summed up of dweight and dbias.

A tensor that is None is not there: no weight, or a result that is not wanted.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton runs these kernels in NumPy, on CPU tensors, for tests without a GPU."""


@triton.jit
def _rows(first, ROWS: tl.constexpr):  # 64 bits: a tensor may have more than 2**31 elements
    return (first + tl.arange(0, ROWS)).to(tl.int64)


@triton.jit
def _load(tensor, rows, columns, mask, inner, outer_stride, inner_stride):
    begin = (rows // inner) * outer_stride + (rows % inner) * inner_stride
    return tl.load(tensor + begin[:, None] + columns[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _load_parameter(parameter, columns, N, if_none: tl.constexpr):
    if parameter is None:
        value = if_none
    else:
        value = tl.load(parameter + columns, columns < N, 0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _load_slots(recovery, columns, N):
    return tl.load(recovery + 2 * N + columns, columns < N, -1.0).to(tl.int32)[None, :]


@triton.jit
def _load_recovery(recovery, columns, N):
    if recovery is None:
        offset, one_over, slot = 0.0, 1.0, -1
    else:
        offset = _load_parameter(recovery, columns, N, 0.0)
        one_over = _load_parameter(recovery + N, columns, N, 0.0)
        slot = _load_slots(recovery, columns, N)
    return offset, one_over, slot


@triton.jit
def _store(tensor, value, rows, columns, mask, N):
    offsets = rows[:, None] * N + columns[None, :]
    tl.store(tensor + offsets, _round(value, tensor.dtype.element_ty), mask)


@triton.jit
def _round(value, dtype: tl.constexpr):
    """`value`, float32, in `dtype`: to the nearest, a tie to the even one, as the GPU rounds."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the lower 16 bits off
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(dtype)


@triton.jit
def _store_statistics(statistics, mean, rstd, rows, M):
    if statistics is not None:
        tl.store(statistics + rows, mean, rows < M)
        tl.store(statistics + M + rows, rstd, rows < M)


@triton.jit
def _reserve(recovery, reserved, xhat, rows, columns, mask, N, RESERVED):
    slot = _load_slots(recovery, columns, N)
    value = _round(xhat, reserved.dtype.element_ty)
    tl.store(reserved + rows[:, None] * RESERVED + slot, value, mask & (slot >= 0))


@triton.jit
def layer_norm_recovery(
    weight, bias, recovery, N, RESERVED, worst, smallest, rounding, BLOCK: tl.constexpr
):
    """How to get xhat from y, and of how many features it cannot be had: one program."""
    lost = tl.zeros((), tl.int32)
    for begin in range(0, N, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < N
        scale = tl.load(weight + columns, inside, 1.0).to(tl.float32)
        offset = tl.zeros((BLOCK,), tl.float32)
        if bias is not None:
            offset = tl.load(bias + columns, inside, 0.0).to(tl.float32)
        recoverability = tl.abs(scale) / (tl.abs(offset) + smallest)
        is_lost = (inside & (recoverability < worst)).to(tl.int32)
        slot = lost + tl.cumsum(is_lost, 0) - 1
        slot = tl.where((is_lost == 1) & (slot < RESERVED), slot, -1)
        lost += tl.sum(is_lost, 0)
        tl.store(recovery + columns, offset, inside)
        # Where y is noise alone 0 is the better guess.
        known = recoverability > rounding
        one_over = tl.where(known, 1 / tl.where(known, scale, 1.0), 0.0)
        tl.store(recovery + N + columns, one_over, inside)
        tl.store(recovery + 2 * N + columns, slot.to(tl.float32), inside)
    tl.store(recovery + 3 * N, lost.to(tl.float32))


# M changes from batch to batch: no compilation for each kind of number that it may be.
@triton.jit(do_not_specialize=["M"])
def layer_norm_forward(
    x, weight, bias, y, statistics, kept, recovery, reserved,
    M, N, RESERVED, eps, x_inner, x_outer_stride, x_inner_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = _rows(tl.program_id(0).to(tl.int64) * ROWS, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    value = _load(x, rows, columns, mask, x_inner, x_outer_stride, x_inner_stride)
    mean = tl.sum(value, 1) / N
    centred = tl.where(mask, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    _store_statistics(statistics, mean, rstd, rows, M)
    scale = _load_parameter(weight, columns, N, 1.0)
    shift = _load_parameter(bias, columns, N, 0.0)
    xhat = centred * rstd[:, None]
    _store(y, xhat * scale + shift, rows, columns, mask, N)
    if kept is not None:
        _store(kept, xhat, rows, columns, mask, N)
    if reserved is not None:
        _reserve(recovery, reserved, xhat, rows, columns, mask, N, RESERVED)


@triton.jit(do_not_specialize=["M"])
def layer_norm_forward_looped(
    x, weight, bias, y, statistics, kept, recovery, reserved,
    M, N, RESERVED, eps, x_inner, x_outer_stride, x_inner_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = _rows(tl.program_id(0).to(tl.int64) * ROWS, ROWS)
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    # The blocks' means and sums of squares, combined as by Chan, Golub and LeVeque.
    for begin in range(0, N, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        value = _load(x, rows, columns, mask, x_inner, x_outer_stride, x_inner_stride)
        count = tl.minimum(N - begin, BLOCK)
        part = count / (begin + count)
        block_mean = tl.sum(value, 1) / count
        centred = tl.where(mask, value - block_mean[:, None], 0.0)
        change = block_mean - mean
        mean += change * part
        squares += tl.sum(centred * centred, 1) + change * change * begin * part
    rstd = tl.rsqrt(squares / N + eps)
    _store_statistics(statistics, mean, rstd, rows, M)
    for begin in range(0, N, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        value = _load(x, rows, columns, mask, x_inner, x_outer_stride, x_inner_stride)
        scale = _load_parameter(weight, columns, N, 1.0)
        shift = _load_parameter(bias, columns, N, 0.0)
        xhat = (value - mean[:, None]) * rstd[:, None]
        _store(y, xhat * scale + shift, rows, columns, mask, N)
        if kept is not None:
            _store(kept, xhat, rows, columns, mask, N)
        if reserved is not None:
            _reserve(recovery, reserved, xhat, rows, columns, mask, N, RESERVED)


@triton.jit
def _load_xhat(
    x, statistics, offset, one_over, slot, reserved, rows, columns, mask, M, RESERVED,
    inner, outer_stride, inner_stride, IS_XHAT: tl.constexpr,
):  # fmt: skip
    xhat = _load(x, rows, columns, mask, inner, outer_stride, inner_stride)
    if reserved is not None:
        own = reserved + rows[:, None] * RESERVED + slot
        own = tl.load(own, mask & (slot >= 0), 0.0).to(tl.float32)
        xhat = tl.where(slot >= 0, own, (xhat - offset) * one_over)
    elif not IS_XHAT:
        mean = tl.load(statistics + rows, rows < M, 0.0)
        rstd = tl.load(statistics + M + rows, rows < M, 0.0)
        xhat = (xhat - mean[:, None]) * rstd[:, None]
    return xhat


@triton.jit(do_not_specialize=["M"])
def layer_norm_backward(
    x, weight, dy, statistics, dx, partials, recovery, reserved, M, N, RESERVED,
    x_inner, x_outer_stride, x_inner_stride, dy_inner, dy_outer_stride, dy_inner_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, IS_XHAT: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    scale = _load_parameter(weight, columns, N, 1.0)
    offset, one_over, slot = _load_recovery(recovery, columns, N)
    # Over the rows of a tile it is summed up at the end, once: threads then wait for each other.
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0).to(tl.int64) * ROWS, M, step, num_stages=STAGES):
        rows = _rows(first, ROWS)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        xhat = _load_xhat(
            x, statistics, offset, one_over, slot, reserved, rows, columns, mask, M, RESERVED,
            x_inner, x_outer_stride, x_inner_stride, IS_XHAT,
        )  # fmt: skip
        upstream = _load(dy, rows, columns, mask, dy_inner, dy_outer_stride, dy_inner_stride)
        if dx is not None:
            dxhat = upstream * scale
            along_xhat = tl.sum(xhat * dxhat, 1) / N
            along_ones = tl.sum(dxhat, 1) / N
            value = dxhat - xhat * along_xhat[:, None] - along_ones[:, None]
            rstd = tl.load(statistics + M + rows, rows < M, 0.0)
            _store(dx, value * rstd[:, None], rows, columns, mask, N)
        if partials is not None:
            dweight += upstream * xhat
            dbias += upstream
    if partials is not None:
        own = partials + tl.program_id(0) * N + columns
        tl.store(own, tl.sum(dweight, 0), columns < N)
        tl.store(own + tl.num_programs(0) * N, tl.sum(dbias, 0), columns < N)


@triton.jit(do_not_specialize=["M"])
def layer_norm_backward_looped(
    x, weight, dy, statistics, dx, partials, recovery, reserved, M, N, RESERVED,
    x_inner, x_outer_stride, x_inner_stride, dy_inner, dy_outer_stride, dy_inner_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, IS_XHAT: tl.constexpr,
):  # fmt: skip
    begin_of_rows = tl.program_id(0).to(tl.int64) * ROWS
    for first in range(begin_of_rows, M, tl.num_programs(0) * ROWS):
        rows = _rows(first, ROWS)
        rstd = tl.load(statistics + M + rows, rows < M, 0.0)
        along_xhat = tl.zeros((ROWS,), tl.float32)
        along_ones = tl.zeros((ROWS,), tl.float32)
        if dx is not None:
            for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
                columns = begin + tl.arange(0, BLOCK)
                mask = (rows < M)[:, None] & (columns < N)[None, :]
                offset, one_over, slot = _load_recovery(recovery, columns, N)
                xhat = _load_xhat(
                    x, statistics, offset, one_over, slot, reserved,
                    rows, columns, mask, M, RESERVED,
                    x_inner, x_outer_stride, x_inner_stride, IS_XHAT,
                )  # fmt: skip
                upstream = _load(
                    dy, rows, columns, mask, dy_inner, dy_outer_stride, dy_inner_stride
                )
                dxhat = upstream * _load_parameter(weight, columns, N, 1.0)
                along_xhat += tl.sum(xhat * dxhat, 1) / N
                along_ones += tl.sum(dxhat, 1) / N
        for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
            columns = begin + tl.arange(0, BLOCK)
            mask = (rows < M)[:, None] & (columns < N)[None, :]
            offset, one_over, slot = _load_recovery(recovery, columns, N)
            xhat = _load_xhat(
                x, statistics, offset, one_over, slot, reserved, rows, columns, mask, M, RESERVED,
                x_inner, x_outer_stride, x_inner_stride, IS_XHAT,
            )  # fmt: skip
            upstream = _load(dy, rows, columns, mask, dy_inner, dy_outer_stride, dy_inner_stride)
            if dx is not None:
                dxhat = upstream * _load_parameter(weight, columns, N, 1.0)
                value = dxhat - xhat * along_xhat[:, None] - along_ones[:, None]
                _store(dx, value * rstd[:, None], rows, columns, mask, N)
            if partials is not None:  # a row is too long to sum up in registers
                own = partials + tl.program_id(0) * N + columns
                filled = (columns < N) & (tl.full((BLOCK,), first, tl.int64) > begin_of_rows)
                dweight = tl.sum(upstream * xhat, 0) + tl.load(own, filled, 0.0)
                tl.store(own, dweight, columns < N)
                own += tl.num_programs(0) * N
                dbias = tl.sum(upstream, 0) + tl.load(own, filled, 0.0)
                tl.store(own, dbias, columns < N)
        # What one thread has stored may be another's to add to in the next tile.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["programs"])
def layer_norm_reduce(
    partials, dweight, dbias, programs, N, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the partials up, into dweight and dbias, always in the same order."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        if dweight is not None:
            _reduce(partials, dweight, columns, programs, N, ROWS, BLOCK)
    else:
        if dbias is not None:
            _reduce(partials + programs * N, dbias, columns, programs, N, ROWS, BLOCK)


@triton.jit
def _reduce(partials, result, columns, programs, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, programs, ROWS):
        rows = begin + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & (columns < N)[None, :]
        total += tl.load(partials + rows[:, None] * N + columns[None, :], mask, 0.0)
    value = _round(tl.sum(total, 0), result.dtype.element_ty)
    tl.store(result + columns, value, columns < N)
