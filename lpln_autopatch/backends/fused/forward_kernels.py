"""The Triton kernels of the forward pass.

Each works on tiles of ROWS rows. Where a row fits into one block, a tile is held in registers from
its one read to its one write; the `_looped` kernels go over a longer row in blocks, twice. A tensor
is read in its own dtype, computed with in float32, and rounded once, on writing.

In the names of arguments and variables, p_ is a pointer, b_ a block in registers, m_ a mask. A
pointer is None where there is no such tensor: no weight, or a result that is not wanted. Arguments
that several kernels share:
    M, N: Rows, and features in each.
    CENTRED: A LayerNorm subtracts the mean; an RMSNorm does not.
    p_statistics: float32, shape (1, M) or (2, M): 1 / sqrt(variance + eps), and the mean.
    p_kept: xhat = (x - mean) / sqrt(variance + eps), rounded.
    p_slots: int32, shape (N,): the place of the xhat of each feature, for `recovery.py`. From 0 on:
        rounded, in that element of the row of p_reserved, shape (M, slots). tiles.IN_Y: in y.
        tiles.IN_KEPT: in the kept tensor.
    p_counts: int32, shape (2,): features that cannot be recovered from y, and small rows, which are
        added to the 0 that the call before has left there.
    p_next: The counts of the next call.
    smallest: The smallest normal number of y's dtype.
    x_inner, x_outer_stride, x_inner_stride: row r begins at element
        (r // inner) * outer_stride + (r % inner) * inner_stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lpln_autopatch.backends.fused import tiles


# M changes from batch to batch: no compilation for each kind of number that it may be.
@triton.jit(do_not_specialize=["M"])
def norm_forward(
    p_x, p_weight, p_bias, p_y, p_statistics, p_kept, p_slots, p_reserved, p_counts, p_next,
    M, N, eps, smallest, x_inner, x_outer_stride, x_inner_stride,
    CENTRED: tl.constexpr, WITH_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b_rows = tiles.rows(tl.program_id(0).to(tl.int64) * ROWS, ROWS)
    b_columns = tl.arange(0, BLOCK)
    m_tile = (b_rows < M)[:, None] & (b_columns < N)[None, :]
    b_x = tiles.load(p_x, b_rows, b_columns, m_tile, x_inner, x_outer_stride, x_inner_stride)
    b_mean = tl.zeros((ROWS,), tl.float32)
    if CENTRED:
        b_mean = tl.sum(b_x, 1) / N
        b_x = tl.where(m_tile, b_x - b_mean[:, None], 0.0)
    b_variance = tl.sum(b_x * b_x, 1) / N
    b_rstd = tl.rsqrt(b_variance + eps)
    tiles.store_statistics(p_statistics, b_mean, b_rstd, b_rows, M, WITH_MEAN)
    tiles.store_results(
        b_x * b_rstd[:, None], p_weight, p_bias, p_y, p_kept, b_rows, b_columns, m_tile, N
    )
    tiles.choose_slots(
        p_x, p_weight, p_bias, p_kept, p_slots, p_reserved, p_counts, p_next,
        b_mean, b_variance, b_rstd, b_rows, M, N, eps, smallest,
        x_inner, x_outer_stride, x_inner_stride, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def norm_forward_looped(
    p_x, p_weight, p_bias, p_y, p_statistics, p_kept, p_slots, p_reserved, p_counts, p_next,
    M, N, eps, smallest, x_inner, x_outer_stride, x_inner_stride,
    CENTRED: tl.constexpr, WITH_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b_rows = tiles.rows(tl.program_id(0).to(tl.int64) * ROWS, ROWS)
    b_mean = tl.zeros((ROWS,), tl.float32)
    b_squares = tl.zeros((ROWS,), tl.float32)
    # The blocks' means and sums of squares, combined as by Chan, Golub and LeVeque.
    for begin in range(0, N, BLOCK):
        b_columns = begin + tl.arange(0, BLOCK)
        m_tile = (b_rows < M)[:, None] & (b_columns < N)[None, :]
        b_x = tiles.load(p_x, b_rows, b_columns, m_tile, x_inner, x_outer_stride, x_inner_stride)
        if CENTRED:
            count = tl.minimum(N - begin, BLOCK)
            part = count / (begin + count)
            b_block_mean = tl.sum(b_x, 1) / count
            b_x = tl.where(m_tile, b_x - b_block_mean[:, None], 0.0)
            b_change = b_block_mean - b_mean
            b_mean += b_change * part
            b_squares += b_change * b_change * begin * part
        b_squares += tl.sum(b_x * b_x, 1)
    b_rstd = tl.rsqrt(b_squares / N + eps)
    tiles.store_statistics(p_statistics, b_mean, b_rstd, b_rows, M, WITH_MEAN)
    for begin in range(0, N, BLOCK):
        b_columns = begin + tl.arange(0, BLOCK)
        m_tile = (b_rows < M)[:, None] & (b_columns < N)[None, :]
        b_x = tiles.load(p_x, b_rows, b_columns, m_tile, x_inner, x_outer_stride, x_inner_stride)
        b_xhat = (b_x - b_mean[:, None]) * b_rstd[:, None]
        tiles.store_results(b_xhat, p_weight, p_bias, p_y, p_kept, b_rows, b_columns, m_tile, N)
    tiles.choose_slots(
        p_x, p_weight, p_bias, p_kept, p_slots, p_reserved, p_counts, p_next,
        b_mean, b_squares / N, b_rstd, b_rows, M, N, eps, smallest,
        x_inner, x_outer_stride, x_inner_stride, BLOCK,
    )  # fmt: skip
