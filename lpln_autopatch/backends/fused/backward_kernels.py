"""The Triton kernels of the backward pass. `forward_kernels.py` explains how they are written.

Arguments that it does not explain:
    p_kept: x, if IS_X; else xhat, or y where p_slots says so.
    rounding: The eps of y's dtype.
    p_partials: float32, shape (2, programs, N): the sums for dweight and dbias of each program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpln_autopatch.backends.fused import tiles


@triton.jit(do_not_specialize=["M"])
def norm_backward(
    p_kept, p_dy, p_statistics, p_weight, p_bias, p_slots, p_reserved, p_dx, p_partials,
    M, N, rounding, smallest,
    x_inner, x_outer_stride, x_inner_stride, dy_inner, dy_outer_stride, dy_inner_stride,
    CENTRED: tl.constexpr, IS_X: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b_columns = tl.arange(0, BLOCK)
    b_weight = tiles.load_parameter(p_weight, b_columns, N, 1.0)
    b_bias, b_inverse, b_slot = tiles.load_recovery(
        p_weight, p_bias, p_slots, b_columns, N, rounding, smallest
    )
    # The rows of a tile are summed up once, at the end: the sum makes threads wait for each other.
    b_dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    b_dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0).to(tl.int64) * ROWS, M, step, num_stages=STAGES):
        b_rows = tiles.rows(first, ROWS)
        m_tile = (b_rows < M)[:, None] & (b_columns < N)[None, :]
        b_xhat = tiles.load_xhat(
            p_kept, p_statistics, b_bias, b_inverse, b_slot, p_slots, p_reserved,
            b_rows, b_columns, m_tile, M, N,
            x_inner, x_outer_stride, x_inner_stride, CENTRED, IS_X,
        )  # fmt: skip
        b_dy = tiles.load(
            p_dy, b_rows, b_columns, m_tile, dy_inner, dy_outer_stride, dy_inner_stride
        )
        if p_dx is not None:
            b_g = b_dy * b_weight
            b_along_xhat = tl.sum(b_xhat * b_g, 1) / N
            b_dx = b_g - b_xhat * b_along_xhat[:, None]
            if CENTRED:
                b_along_ones = tl.sum(b_g, 1) / N
                b_dx -= b_along_ones[:, None]
            b_rstd = tl.load(p_statistics + b_rows, b_rows < M, 0.0)
            tiles.store(p_dx, b_dx * b_rstd[:, None], b_rows, b_columns, m_tile, N)
        if p_partials is not None:
            b_dweight += b_dy * b_xhat
            b_dbias += b_dy
    if p_partials is not None:
        p_own = p_partials + tl.program_id(0) * N + b_columns
        tl.store(p_own, tl.sum(b_dweight, 0), b_columns < N)
        tl.store(p_own + tl.num_programs(0) * N, tl.sum(b_dbias, 0), b_columns < N)


@triton.jit(do_not_specialize=["M"])
def norm_backward_looped(
    p_kept, p_dy, p_statistics, p_weight, p_bias, p_slots, p_reserved, p_dx, p_partials,
    M, N, rounding, smallest,
    x_inner, x_outer_stride, x_inner_stride, dy_inner, dy_outer_stride, dy_inner_stride,
    CENTRED: tl.constexpr, IS_X: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin_of_rows = tl.program_id(0).to(tl.int64) * ROWS
    for first in range(begin_of_rows, M, tl.num_programs(0) * ROWS):
        b_rows = tiles.rows(first, ROWS)
        b_rstd = tl.load(p_statistics + b_rows, b_rows < M, 0.0)
        b_along_xhat = tl.zeros((ROWS,), tl.float32)
        b_along_ones = tl.zeros((ROWS,), tl.float32)
        if p_dx is not None:
            for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
                b_columns, m_tile, b_xhat, b_dy, b_g = _load_block(
                    p_kept, p_weight, p_bias, p_dy, p_statistics, p_slots, p_reserved,
                    b_rows, begin, M, N, rounding, smallest,
                    x_inner, x_outer_stride, x_inner_stride,
                    dy_inner, dy_outer_stride, dy_inner_stride, CENTRED, IS_X, BLOCK,
                )  # fmt: skip
                b_along_xhat += tl.sum(b_xhat * b_g, 1) / N
                if CENTRED:
                    b_along_ones += tl.sum(b_g, 1) / N
        for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
            b_columns, m_tile, b_xhat, b_dy, b_g = _load_block(
                p_kept, p_weight, p_bias, p_dy, p_statistics, p_slots, p_reserved,
                b_rows, begin, M, N, rounding, smallest,
                x_inner, x_outer_stride, x_inner_stride,
                dy_inner, dy_outer_stride, dy_inner_stride, CENTRED, IS_X, BLOCK,
            )  # fmt: skip
            if p_dx is not None:
                b_dx = b_g - b_xhat * b_along_xhat[:, None] - b_along_ones[:, None]
                tiles.store(p_dx, b_dx * b_rstd[:, None], b_rows, b_columns, m_tile, N)
            if p_partials is not None:  # a row is too long to sum up in registers
                p_own = p_partials + tl.program_id(0) * N + b_columns
                m_filled = (b_columns < N) & (tl.full((BLOCK,), first, tl.int64) > begin_of_rows)
                b_dweight = tl.sum(b_dy * b_xhat, 0) + tl.load(p_own, m_filled, 0.0)
                tl.store(p_own, b_dweight, b_columns < N)
                p_own += tl.num_programs(0) * N
                b_dbias = tl.sum(b_dy, 0) + tl.load(p_own, m_filled, 0.0)
                tl.store(p_own, b_dbias, b_columns < N)
        # What one thread has stored may be another's to add to in the next tile.
        tl.debug_barrier()


@triton.jit
def _load_block(
    p_kept, p_weight, p_bias, p_dy, p_statistics, p_slots, p_reserved,
    b_rows, begin, M, N, rounding, smallest,
    x_inner, x_outer_stride, x_inner_stride, dy_inner, dy_outer_stride, dy_inner_stride,
    CENTRED: tl.constexpr, IS_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load a block of long rows: its columns and mask, xhat, dy, and g = dy * weight."""
    b_columns = begin + tl.arange(0, BLOCK)
    m_tile = (b_rows < M)[:, None] & (b_columns < N)[None, :]
    b_bias, b_inverse, b_slot = tiles.load_recovery(
        p_weight, p_bias, p_slots, b_columns, N, rounding, smallest
    )
    b_xhat = tiles.load_xhat(
        p_kept, p_statistics, b_bias, b_inverse, b_slot, p_slots, p_reserved,
        b_rows, b_columns, m_tile, M, N,
        x_inner, x_outer_stride, x_inner_stride, CENTRED, IS_X,
    )  # fmt: skip
    b_dy = tiles.load(p_dy, b_rows, b_columns, m_tile, dy_inner, dy_outer_stride, dy_inner_stride)
    b_g = b_dy * tiles.load_parameter(p_weight, b_columns, N, 1.0)
    return b_columns, m_tile, b_xhat, b_dy, b_g


@triton.jit(do_not_specialize=["programs"])
def norm_reduce(
    p_partials, p_dweight, p_dbias, programs, N, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the partials up, into dweight and dbias, always in the same order."""
    b_columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        if p_dweight is not None:
            _reduce(p_partials, p_dweight, b_columns, programs, N, ROWS, BLOCK)
    else:
        if p_dbias is not None:
            _reduce(p_partials + programs * N, p_dbias, b_columns, programs, N, ROWS, BLOCK)


@triton.jit
def _reduce(p_partials, p_result, b_columns, programs, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    b_total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, programs, ROWS):
        b_rows = begin + tl.arange(0, ROWS)
        m_tile = (b_rows < programs)[:, None] & (b_columns < N)[None, :]
        b_total += tl.load(p_partials + b_rows[:, None] * N + b_columns[None, :], m_tile, 0.0)
    b_sum = tiles.rounded(tl.sum(b_total, 0), p_result.dtype.element_ty)
    tl.store(p_result + b_columns, b_sum, b_columns < N)
