"""Allocate the results of the kernels, and launch them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton

from lpln_autopatch.backends.fused import backward_kernels, forward_kernels, grid, tiles
from lpln_autopatch.backends.fused.compiled import launch
from lpln_autopatch.backends.fused.recovery import Recovery

INTERPRETED: bool = tiles.INTERPRETED.value

COUNTS_ARRIVE_LATE = not INTERPRETED
"""True where counts take a while from the device to the host."""


@functools.cache
def takes_cpu() -> bool:
    """Return True if Triton launches kernels on CPU tensors: its driver says on which."""
    if INTERPRETED:
        return True
    try:
        device: torch.device = triton.runtime.driver.active.get_active_torch_device()
    except RuntimeError:  # there is no driver, as on a machine without a GPU
        return False
    return device.type == "cpu"


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
        dtype: The dtype of the result.
        centred: Subtract the mean, as a LayerNorm does; an RMSNorm does not.
        statistics: Gets 1 / sqrt(variance + eps) of the M rows, float32, shape (1, M), and the mean
            if the shape is (2, M). May be None.
        kept: Gets xhat = (x - mean) / sqrt(variance + eps), shape of `x`, contiguous. May be None.
        recovery: Gets the xhat of the features that have a slot. May be None.
        counts: The number of rows whose xhat is small is added to what `choose_slots` wrote.

    Returns:
        Tensor of the shape of `x`, contiguous, in `dtype`.
    """
    n = x.shape[-n_dims:].numel()
    m = x.numel() // n
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    tile = grid.tile(n, grid.LOOPED_FORWARD)
    kernel = forward_kernels.norm_forward_looped if tile.looped else forward_kernels.norm_forward
    x, layout = _layout(x, n_dims, n)
    slots, reserved, width = _parts(recovery)
    # Without a bias y is xhat but for its scale: as exact where xhat is small.
    counts = None if bias is None else counts
    with_mean = statistics is not None and statistics.shape[0] == 2
    with _on(device := x.get_device()):
        launch(
            kernel, (-(-m // tile.rows), 1, 1), device,
            (x, weight, bias, y, statistics, kept, slots, reserved, counts),
            (m, n, width, float(eps), *layout),
            (centred, with_mean, tile.rows, tile.block), tile.warps,
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
        weight: As for `forward`, and so is bias.
        recovery: Gets the slots.
        counts: Gets the number of features, and 0 rows, int32, shape (2,).
        dtype: The dtype of y.
        worst_ratio: A feature needs a slot if its |bias| is more than so many times its |weight|.
            The features get slots in their order, as long as there are slots.
        keeps_y: True if backward gets y, and recovers the other features from it; False if it gets
            xhat.
    """
    n = weight.numel()
    block = min(1024, 1 << (n - 1).bit_length())
    otherwise = tiles.IN_Y.value if keeps_y else tiles.IN_KEPT.value
    _, smallest = _limits(dtype)
    with _on(device := weight.get_device()):
        launch(
            forward_kernels.norm_slots, (1, 1, 1), device,
            (weight, bias, recovery.slots, counts),
            (n, recovery.reserved.shape[1], 1 / worst_ratio, smallest),
            (otherwise, block), 4, unspecialised=0,
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
        n_dims: As for `forward`, which has written `statistics`; so are weight, bias and centred.
        wanted: True for each of the three that is computed. The others are None.
        dtypes: The dtypes of the three.
        is_x: True if x itself was kept.
        recovery: The argument of `forward`.
    """
    features = kept.shape[-n_dims:]
    m, n = statistics.shape[1], features.numel()
    tile, programs, stages = grid.backward(
        m, n, _multiprocessors(kept.device), recovery is not None
    )
    dx = dweight = dbias = partials = None
    # For a torch.Size `new_empty` takes twice as long as `empty_like`.
    if wanted[0]:
        dx = torch.empty_like(kept, dtype=dtypes[0], memory_format=torch.contiguous_format)
    if wanted[1] or wanted[2]:
        parameter = kept.new_empty(features) if weight is None else weight
        dweight = torch.empty_like(parameter, dtype=dtypes[1]) if wanted[1] else None
        dbias = torch.empty_like(parameter, dtype=dtypes[2]) if wanted[2] else None
        partials = kept.new_empty(2, programs, n, dtype=torch.float32)
    kernel = (
        backward_kernels.norm_backward_looped if tile.looped else backward_kernels.norm_backward
    )
    kept, kept_layout = _layout(kept, n_dims, n)
    dy, dy_layout = _layout(dy, n_dims, n)
    slots, reserved, width = _parts(recovery)
    with _on(device := kept.get_device()):
        launch(
            kernel, (programs, 1, 1), device,
            (kept, weight, bias, dy, statistics, dx, partials, slots, reserved),
            (m, n, width, *_limits(dy.dtype), *kept_layout, *dy_layout),
            (centred, is_x, tile.rows, tile.block, stages), tile.warps,
        )  # fmt: skip
        if partials is not None:
            launch(
                backward_kernels.norm_reduce, (-(-n // grid.REDUCED[1]), 2, 1), device,
                (partials, dweight, dbias), (programs, n), grid.REDUCED, 4,
            )  # fmt: skip
    return dx, dweight, dbias


def _parts(
    recovery: Recovery | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    if recovery is None:
        return None, None, 0
    return recovery.slots, recovery.reserved, recovery.reserved.shape[1]


@functools.cache
def _limits(dtype: torch.dtype) -> tuple[float, float]:
    """Return the eps of `dtype`, and its smallest normal number."""
    limits = torch.finfo(dtype)
    return limits.eps, limits.smallest_normal


def _layout(
    x: torch.Tensor, n_dims: int, features: int
) -> tuple[torch.Tensor, tuple[int, int, int]]:
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
        return _layout(x.contiguous(), n_dims, features)
    (_, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *kept][-2:]
    return x, (inner, outer_stride, inner_stride)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted: a few, so that each goes through several tiles
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


_interpreter = threading.RLock()  # it has one grid for all threads


_nothing = contextlib.nullcontext()


def _on(device: int) -> AbstractContextManager[Any]:
    if INTERPRETED:
        return _interpreter
    # Triton launches on the current device, which need not be that of the tensors. The CPU is -1.
    if device >= 0 and device != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _nothing
