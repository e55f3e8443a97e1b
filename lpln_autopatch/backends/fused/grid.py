"""The tiles on which the kernels work, and the number of programs: arithmetic, without Triton."""

from __future__ import annotations

import dataclasses

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
