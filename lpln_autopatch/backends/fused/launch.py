"""How the kernels are launched: on which tiles, by how many programs, over which memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lpln_autopatch.backends.autograd import NO_RECOVERY, Recovery
from lpln_autopatch.backends.fused import kernels, tiles

INTERPRETED: bool = tiles.INTERPRETED.value

# Measured on an H200.
_ONE_BLOCK = 8192  # longest row that is held in registers
_TILE = 2048  # elements of a tile of several short rows
_LOOPED_FORWARD, _LOOPED_BACKWARD = (1, 8192), (2, 2048)  # rows and features of a tile of long ones
_WARPS = 8  # at most, of a program
_WARPS_PER_MULTIPROCESSOR = 16  # that go through the rows in backward,
_LOOPED_WARPS_PER_MULTIPROCESSOR = 32  # if these are long
_REDUCED = (128, 32)  # the tile of partial sums that are summed up at once

# Triton's default changes in 3.10, and until then it warns.
_OPTIONS = {"enable_fp_fusion": True}


def forward(
    x: torch.Tensor,
    n_dims: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    statistics: torch.Tensor | None,
    kept: torch.Tensor | None,
    recovery: Recovery = NO_RECOVERY,
) -> torch.Tensor:
    """Normalise `x` over its last `n_dims` dimensions.

    Args:
        x: Input, shape (..., *normalized_shape), float32, float16 or bfloat16, any strides.
        n_dims: The length of normalized_shape.
        weight: Scale, shape normalized_shape, contiguous, float, or None.
        bias: Shift, the same.
        eps: Added to the variance.
        dtype: That of the result.
        statistics: Where to write mean and 1 / sqrt(variance + eps) of the M rows, float32, shape
            (2, M), or None.
        kept: Where to write xhat = (x - mean) / sqrt(variance + eps), of the shape of `x`,
            contiguous, or None.
        recovery: What `recovery_of` gives: where to write xhat of the features that have a slot.

    Returns:
        Tensor of the shape of `x`, contiguous, in `dtype`.
    """
    m, n = x.shape[:-n_dims].numel(), x.shape[-n_dims:].numel()
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rows, block, warps = _tile(n, _LOOPED_FORWARD)
    kernel = kernels.layer_norm_forward if block >= n else kernels.layer_norm_forward_looped
    x, *layout = _layout(x, n_dims)
    with _on_device_of(x):
        kernel[(-(-m // rows),)](
            x, weight, bias, y, statistics, kept, *recovery, m, n, _width(recovery[1]), eps,
            *layout, rows, block, num_warps=warps, **_OPTIONS,
        )  # fmt: skip
    return y


def recovery_of(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    m: int,
    dtype: torch.dtype,
    features_per_reserved: int,
    worst_ratio: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How `backward` gets xhat of `m` rows from a y in `dtype`: a `Recovery`.

    Lost are the features whose |bias| is more than `worst_ratio` times |weight|. They have a slot
    each, in order, as long as there are slots: one for so many features. How many are lost is the
    last element of the first tensor.
    """
    n = weight.numel()
    reserved = weight.new_empty((m, -(-n // features_per_reserved)), dtype=dtype)
    recovery = weight.new_empty(3 * n + 1, dtype=torch.float32)
    limits = torch.finfo(dtype)
    block = min(1024, 1 << (n - 1).bit_length())
    with _on_device_of(weight):
        kernels.layer_norm_recovery[(1,)](
            weight, bias, recovery, n, reserved.shape[1],
            1 / worst_ratio, limits.smallest_normal, limits.eps, block, num_warps=4, **_OPTIONS,
        )  # fmt: skip
    return recovery, reserved


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    n_dims: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    wanted: Sequence[bool],
    x_dtype: torch.dtype,
    is_xhat: bool,
    recovery: Recovery,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x, weight and bias, of those that are `wanted`, each in its own dtype.

    `dy` is the gradient of the result of `forward`, in its dtype, of any strides; other arguments
    are those of `forward`, which has written `statistics`. If `is_xhat`, what `forward` has written
    as `kept` is in the place of x, whose dtype was `x_dtype`; with `recovery` it may be y.
    """
    m, n = statistics.shape[1], x.shape[-n_dims:].numel()
    processors = _multiprocessors(x.device)
    rows, block, warps = _tile(n, _LOOPED_BACKWARD)
    stages = _stages(rows * block, block < n and recovery[0] is not None)
    if m < rows * processors:
        rows = 1
    at_once = _WARPS_PER_MULTIPROCESSOR if block >= n else _LOOPED_WARPS_PER_MULTIPROCESSOR
    programs = min(-(-m // rows), processors * (at_once // warps))
    dx = None
    if wanted[0]:
        dx = torch.empty_like(x, dtype=x_dtype, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight) if weight is not None and wanted[1] else None
    dbias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    partials = None
    if dweight is not None or dbias is not None:
        partials = x.new_empty((2, programs, n), dtype=torch.float32)
    kernel = kernels.layer_norm_backward if block >= n else kernels.layer_norm_backward_looped
    x, *x_layout = _layout(x, n_dims)
    dy, *dy_layout = _layout(dy, n_dims)
    with _on_device_of(x):
        kernel[(programs,)](
            x, weight, dy, statistics, dx, partials, *recovery, m, n, _width(recovery[1]),
            *x_layout, *dy_layout, rows, block, stages, is_xhat, num_warps=warps, **_OPTIONS,
        )  # fmt: skip
        if partials is not None:
            kernels.layer_norm_reduce[(-(-n // _REDUCED[1]), 2)](
                partials, dweight, dbias, programs, n, *_REDUCED, num_warps=4, **_OPTIONS
            )
    return dx, dweight, dbias


def _width(reserved: torch.Tensor | None) -> int:
    return 0 if reserved is None else reserved.shape[1]


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
def _tile(n: int, looped: tuple[int, int]) -> tuple[int, int, int]:
    """Rows and features of a tile, and the warps that work on it."""
    if n > _ONE_BLOCK:
        rows, block = looped
    else:
        block = 1 << (n - 1).bit_length()
        rows = max(1, _TILE // block)
    # 512 elements a warp: two loads of 16 bytes a thread for a 16-bit x.
    return rows, block, min(_WARPS, max(1, rows * block // 512))


def _stages(elements: int, loads_recovery: bool) -> int:
    """Of backward's loops over tiles of so many elements: the next ones are loaded meanwhile.

    What they load, of `shift` and its like too, has to fit into 99 KB, where smaller GPUs hold it.
    """
    return 3 if elements <= 4096 and not loads_recovery else 2


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted: a few, so that each goes through several tiles
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be that of x.
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
