"""The Triton kernels of the backend "fused".

Each works on tiles of ROWS rows. Where a row fits into one block, a tile is held in registers from
its one read to its one write; the `_looped` kernels go over a longer row in blocks, twice. All is
read in its own dtype, computed with in float32, and rounded once, on writing.

Arguments that several kernels share:
    M, N: Rows, and features in each.
    statistics: float32, shape (2, M): mean, and 1 / sqrt(variance + eps).
    kept: xhat = (x - mean) / sqrt(variance + eps), rounded: backward takes it for x if IS_XHAT.
    recovery, reserved: how backward gets xhat from y (or from xhat, unchanged), which it takes for
        x if they are there.
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

import triton
import triton.language as tl

from lpln_autopatch.backends.fused import tiles


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
    rows = tiles.rows(tl.program_id(0).to(tl.int64) * ROWS, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    value = tiles.load(x, rows, columns, mask, x_inner, x_outer_stride, x_inner_stride)
    mean = tl.sum(value, 1) / N
    centred = tl.where(mask, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    tiles.store_statistics(statistics, mean, rstd, rows, M)
    scale = tiles.load_parameter(weight, columns, N, 1.0)
    shift = tiles.load_parameter(bias, columns, N, 0.0)
    xhat = centred * rstd[:, None]
    tiles.store(y, xhat * scale + shift, rows, columns, mask, N)
    if kept is not None:
        tiles.store(kept, xhat, rows, columns, mask, N)
    if reserved is not None:
        tiles.reserve(recovery, reserved, xhat, rows, columns, mask, N, RESERVED)


@triton.jit(do_not_specialize=["M"])
def layer_norm_forward_looped(
    x, weight, bias, y, statistics, kept, recovery, reserved,
    M, N, RESERVED, eps, x_inner, x_outer_stride, x_inner_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tiles.rows(tl.program_id(0).to(tl.int64) * ROWS, ROWS)
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    # The blocks' means and sums of squares, combined as by Chan, Golub and LeVeque.
    for begin in range(0, N, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        value = tiles.load(x, rows, columns, mask, x_inner, x_outer_stride, x_inner_stride)
        count = tl.minimum(N - begin, BLOCK)
        part = count / (begin + count)
        block_mean = tl.sum(value, 1) / count
        centred = tl.where(mask, value - block_mean[:, None], 0.0)
        change = block_mean - mean
        mean += change * part
        squares += tl.sum(centred * centred, 1) + change * change * begin * part
    rstd = tl.rsqrt(squares / N + eps)
    tiles.store_statistics(statistics, mean, rstd, rows, M)
    for begin in range(0, N, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        value = tiles.load(x, rows, columns, mask, x_inner, x_outer_stride, x_inner_stride)
        scale = tiles.load_parameter(weight, columns, N, 1.0)
        shift = tiles.load_parameter(bias, columns, N, 0.0)
        xhat = (value - mean[:, None]) * rstd[:, None]
        tiles.store(y, xhat * scale + shift, rows, columns, mask, N)
        if kept is not None:
            tiles.store(kept, xhat, rows, columns, mask, N)
        if reserved is not None:
            tiles.reserve(recovery, reserved, xhat, rows, columns, mask, N, RESERVED)


@triton.jit(do_not_specialize=["M"])
def layer_norm_backward(
    x, weight, dy, statistics, dx, partials, recovery, reserved, M, N, RESERVED,
    x_inner, x_outer_stride, x_inner_stride, dy_inner, dy_outer_stride, dy_inner_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, IS_XHAT: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    scale = tiles.load_parameter(weight, columns, N, 1.0)
    offset, one_over, slot = tiles.load_recovery(recovery, columns, N)
    # Over the rows of a tile it is summed up at the end, once: threads then wait for each other.
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0).to(tl.int64) * ROWS, M, step, num_stages=STAGES):
        rows = tiles.rows(first, ROWS)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        xhat = tiles.load_xhat(
            x, statistics, offset, one_over, slot, reserved, rows, columns, mask, M, RESERVED,
            x_inner, x_outer_stride, x_inner_stride, IS_XHAT,
        )  # fmt: skip
        upstream = tiles.load(dy, rows, columns, mask, dy_inner, dy_outer_stride, dy_inner_stride)
        if dx is not None:
            dxhat = upstream * scale
            along_xhat = tl.sum(xhat * dxhat, 1) / N
            along_ones = tl.sum(dxhat, 1) / N
            value = dxhat - xhat * along_xhat[:, None] - along_ones[:, None]
            rstd = tl.load(statistics + M + rows, rows < M, 0.0)
            tiles.store(dx, value * rstd[:, None], rows, columns, mask, N)
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
        rows = tiles.rows(first, ROWS)
        rstd = tl.load(statistics + M + rows, rows < M, 0.0)
        along_xhat = tl.zeros((ROWS,), tl.float32)
        along_ones = tl.zeros((ROWS,), tl.float32)
        if dx is not None:
            for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
                columns = begin + tl.arange(0, BLOCK)
                mask = (rows < M)[:, None] & (columns < N)[None, :]
                offset, one_over, slot = tiles.load_recovery(recovery, columns, N)
                xhat = tiles.load_xhat(
                    x, statistics, offset, one_over, slot, reserved,
                    rows, columns, mask, M, RESERVED,
                    x_inner, x_outer_stride, x_inner_stride, IS_XHAT,
                )  # fmt: skip
                upstream = tiles.load(
                    dy, rows, columns, mask, dy_inner, dy_outer_stride, dy_inner_stride
                )
                dxhat = upstream * tiles.load_parameter(weight, columns, N, 1.0)
                along_xhat += tl.sum(xhat * dxhat, 1) / N
                along_ones += tl.sum(dxhat, 1) / N
        for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
            columns = begin + tl.arange(0, BLOCK)
            mask = (rows < M)[:, None] & (columns < N)[None, :]
            offset, one_over, slot = tiles.load_recovery(recovery, columns, N)
            xhat = tiles.load_xhat(
                x, statistics, offset, one_over, slot, reserved, rows, columns, mask, M, RESERVED,
                x_inner, x_outer_stride, x_inner_stride, IS_XHAT,
            )  # fmt: skip
            upstream = tiles.load(
                dy, rows, columns, mask, dy_inner, dy_outer_stride, dy_inner_stride
            )
            if dx is not None:
                dxhat = upstream * tiles.load_parameter(weight, columns, N, 1.0)
                value = dxhat - xhat * along_xhat[:, None] - along_ones[:, None]
                tiles.store(dx, value * rstd[:, None], rows, columns, mask, N)
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
    value = tiles.rounded(tl.sum(total, 0), result.dtype.element_ty)
    tl.store(result + columns, value, columns < N)
