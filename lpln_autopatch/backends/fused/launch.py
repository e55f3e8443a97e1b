"""How the kernels are launched, and over which memory."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lpln_autopatch.backends.fused import backward_kernels, forward_kernels, grid, tiles
from lpln_autopatch.backends.fused.recovery import Recovery

INTERPRETED: bool = tiles.INTERPRETED.value

# Triton's default changes in 3.10, and until then it warns.
_OPTIONS = {"enable_fp_fusion": True}


def forward(
    x: torch.Tensor,
    n_dims: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    centred: bool,
    statistics: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    recovery: Recovery | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise `x` over its last `n_dims` dimensions.

    Args:
        x: Input, shape (..., *normalized_shape), float32, float16 or bfloat16, any strides.
        n_dims: The length of normalized_shape.
        weight: Scale, shape normalized_shape, contiguous, float, or None.
        bias: Shift, the same.
        eps: Added to the variance.
        dtype: That of the result.
        centred: Subtract the mean, as a LayerNorm does; an RMSNorm does not.
        statistics: Where to write 1 / sqrt(variance + eps) of the M rows, float32, shape (1, M); or
            that and the mean, shape (2, M); or None.
        kept: Where to write xhat = (x - mean) / sqrt(variance + eps), of the shape of `x`,
            contiguous, or None.
        recovery: Where to write the xhat of the features that have a slot, or None.
        counts: Where to add the number of rows whose xhat is small, as `choose_slots` left it.

    Returns:
        Tensor of the shape of `x`, contiguous, in `dtype`.
    """
    n = x.shape[-n_dims:].numel()
    m = x.numel() // n
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    tile = grid.tile(n, grid.LOOPED_FORWARD)
    kernel = forward_kernels.norm_forward_looped if tile.looped else forward_kernels.norm_forward
    x, *layout = _layout(x, n_dims)
    slots, reserved, width = _parts(recovery)
    # Without a bias y is xhat but for its scale: as exact where xhat is small.
    counts = None if bias is None else counts
    with_mean = statistics is not None and statistics.shape[0] == 2
    with _on_device_of(x):
        kernel[(-(-m // tile.rows),)](
            x, weight, bias, y, statistics, kept, slots, reserved, counts, m, n, width, eps,
            *layout, centred, with_mean, tile.rows, tile.block, num_warps=tile.warps, **_OPTIONS,
        )  # fmt: skip
    return y


def choose_slots(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    recovery: Recovery,
    counts: torch.Tensor,
    dtype: torch.dtype,
    worst_ratio: float,
    keeps_y: bool,
) -> None:
    """Choose the slots of `recovery`, and count the features that need one.

    Args:
        weight: Scale, as for `forward`; bias too.
        recovery: Where to write the slots.
        counts: Where to write the number, and beside it 0 rows, int32, shape (2,).
        dtype: That of y.
        worst_ratio: A feature needs a slot if its |bias| is more than so many times its |weight|.
            Each gets one, in order, as long as there are slots.
        keeps_y: Whether backward gets y, from which to recover the other features, or xhat.
    """
    n = weight.numel()
    block = min(1024, 1 << (n - 1).bit_length())
    otherwise = tiles.IN_Y.value if keeps_y else tiles.IN_KEPT.value
    smallest = torch.finfo(dtype).smallest_normal
    with _on_device_of(weight):
        forward_kernels.norm_slots[(1,)](
            weight, bias, recovery.slots, counts, n, recovery.reserved.shape[1],
            1 / worst_ratio, smallest, otherwise, block, num_warps=4, **_OPTIONS,
        )  # fmt: skip


def backward(
    dy: torch.Tensor,
    kept: torch.Tensor,
    n_dims: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    wanted: Sequence[bool],
    dtypes: Sequence[torch.dtype],
    centred: bool,
    is_x: bool,
    recovery: Recovery | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of x, weight and bias.

    Args:
        dy: The gradient of the result of `forward`, in its dtype, any strides.
        kept: x if `is_x`, else the xhat that `forward` has written, or y with a `recovery`.
        n_dims: As for `forward`, which has written `statistics`; and so are weight, bias, centred.
        wanted: Which of the three are computed. The others are None.
        dtypes: Of the three.
        is_x: Whether x itself was kept.
        recovery: The one that `forward` was called with.
    """
    m, n = statistics.shape[1], kept.shape[-n_dims:].numel()
    tile, programs = grid.backward(m, n, _multiprocessors(kept.device))
    stages = grid.stages(tile, recovery is not None)
    empty, features = kept.new_empty, kept.shape[-n_dims:]
    dx = empty(kept.shape, dtype=dtypes[0]) if wanted[0] else None
    dweight = empty(features, dtype=dtypes[1]) if wanted[1] else None
    dbias = empty(features, dtype=dtypes[2]) if wanted[2] else None
    partials = None
    if wanted[1] or wanted[2]:
        partials = empty((2, programs, n), dtype=torch.float32)
    kernel = (
        backward_kernels.norm_backward_looped if tile.looped else backward_kernels.norm_backward
    )
    kept, *kept_layout = _layout(kept, n_dims)
    limits = torch.finfo(dy.dtype)
    dy, *dy_layout = _layout(dy, n_dims)
    slots, reserved, width = _parts(recovery)
    with _on_device_of(kept):
        kernel[(programs,)](
            kept, weight, bias, dy, statistics, dx, partials, slots, reserved, m, n, width,
            limits.eps, limits.smallest_normal, *kept_layout, *dy_layout,
            centred, is_x, tile.rows, tile.block, stages, num_warps=tile.warps, **_OPTIONS,
        )  # fmt: skip
        if partials is not None:
            backward_kernels.norm_reduce[(-(-n // grid.REDUCED[1]), 2)](
                partials, dweight, dbias, programs, n, *grid.REDUCED, num_warps=4, **_OPTIONS
            )
    return dx, dweight, dbias


def _parts(
    recovery: Recovery | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    if recovery is None:
        return None, None, 0
    return recovery.slots, recovery.reserved, recovery.reserved.shape[1]


def _layout(x: torch.Tensor, n_dims: int) -> tuple[torch.Tensor, int, int, int]:
    """How to find the rows of `x`: itself, or a copy with contiguous rows, and three integers.

    They are inner, outer_stride and inner_stride: row r begins at element
    (r // inner) * outer_stride + (r % inner) * inner_stride.
    """
    if x.is_contiguous():
        return x, 1, x.shape[-n_dims:].numel(), 0
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
        return _layout(x.contiguous(), n_dims)
    (_, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *kept][-2:]
    return x, inner, outer_stride, inner_stride


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted: a few, so that each goes through several tiles
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


_interpreter = threading.RLock()  # it has one grid for all threads


def _on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    if INTERPRETED:
        return _interpreter
    # Triton launches on the current device, which need not be that of x.
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
