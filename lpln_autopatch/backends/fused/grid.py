"""Where rows lie, the tiles of the kernels, and how many programs: arithmetic, without Triton."""

from __future__ import annotations

import dataclasses

from torch import Tensor

# Measured on an H200.
ONE_BLOCK = 8192  # longest row that is held in registers
_TILE = 2048  # elements of a tile of several short rows
LOOPED_FORWARD, LOOPED_BACKWARD = (1, 8192), (2, 2048)  # rows and features of a tile of long ones
_WARPS = 8  # at most, of a program
_WARPS_PER_MULTIPROCESSOR = 16  # that go through the rows in backward,
_LOOPED_WARPS_PER_MULTIPROCESSOR = 32  # if these are long
REDUCED = (128, 32)  # the tile of partial sums that are summed up at once


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile that a program works on.

    Attributes:
        rows: Its rows.
        block: The features that it holds at once.
        warps: The warps that work on it.
        looped: True if a row is longer than the block.
    """

    rows: int
    block: int
    warps: int
    looped: bool


def tile(n: int, of_long_rows: tuple[int, int]) -> Tile:
    """Return the tile for rows of `n` features."""
    if n > ONE_BLOCK:
        rows, block = of_long_rows
    else:
        block = 1 << (n - 1).bit_length()
        rows = max(1, _TILE // block)
    # 512 elements a warp: two loads of 16 bytes a thread for a 16-bit x.
    return Tile(rows, block, min(_WARPS, max(1, rows * block // 512)), block < n)


def stages(tile: Tile, loads_recovery: bool) -> int:
    """Return the stages of backward's loops over tiles: how many tiles are loaded at once.

    The tiles that a loop loads, with bias and slots, have to fit into 99 KB of shared memory,
    which is all that smaller GPUs have.
    """
    return 3 if tile.rows * tile.block <= 4096 and not (tile.looped and loads_recovery) else 2


def backward(
    m: int, n: int, multiprocessors: int, loads_recovery: bool = False
) -> tuple[Tile, int, int]:
    """Return the tile of backward for `m` rows of `n` features, the programs and the stages."""
    of = tile(n, LOOPED_BACKWARD)
    if m < of.rows * multiprocessors:
        of = dataclasses.replace(of, rows=1)
    at_once = _LOOPED_WARPS_PER_MULTIPROCESSOR if of.looped else _WARPS_PER_MULTIPROCESSOR
    programs = min(-(-m // of.rows), multiprocessors * (at_once // of.warps))
    return of, programs, stages(of, loads_recovery)


def layout(x: Tensor, n_dims: int, features: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Find the rows of `x`: `x` itself, or a copy with contiguous rows, and three integers.

    They are inner, outer_stride and inner_stride: row r begins at element
    (r // inner) * outer_stride + (r % inner) * inner_stride.
    """
    if x.is_contiguous():
        return x, (1, features, 0)
    # The dimensions of more than one element; neighbours that make up one, as one.
    kept: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-n_dims], x.stride()[:-n_dims], strict=True):
        if size == 1:
            continue
        if kept and kept[-1][1] == size * stride:
            kept[-1] = (kept[-1][0] * size, stride)
        else:
            kept.append((size, stride))
    row = x[(0,) * (x.dim() - n_dims)]
    if not row.is_contiguous() or len(kept) > 2:
        return layout(x.contiguous(), n_dims, features)
    (_, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *kept][-2:]
    return x, (inner, outer_stride, inner_stride)
