"""LayerNorm of a low-precision x on CPU: PyTorch's mixed kernel, with sums in float32.

That kernel reads x in its own dtype, computes in float32 and rounds once, and x itself is what is
kept for backward. But its own backward sums the gradients of weight and bias in x's dtype, 7 % off
at 4096 rows of bfloat16 and 26 % at 65536 (torch 2.13 and 2.15, one thread). So here backward sums
them up in float32, over copies of a block of rows at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch._torch_compat import (
    CPU_TAKES_MIXED_DTYPES,
    autocast_disabled,
    forward_mode_is_on,
    never_a_frame_of_its_own,
)
from lpln_autopatch.backends import gradients
from lpln_autopatch.backends.protocol import Affine, Shape

SMALLEST = 1 << 18
"""The elements of the smallest x that is taken where gradients are wanted.

An autograd function in Python and its sums in blocks cost some 100 microseconds a call. For a
smaller x an upcast costs less. A float32 copy of this many elements takes 1 MiB, and from there on
its page faults take more than all the rest, in some processes. Without gradients nothing is kept
and nothing summed up, and the kernel takes as long as an upcast or less, whatever the size.
"""


class _Repeated(threading.local):
    """Marks a thread whose calls run again with gradients, and must give the same values then."""

    now = False


repeated = _Repeated()

_BLOCK = 1 << 18  # elements of what is copied to float32 at a time: two copies fit into a cache


def takes(x: Tensor, shape: Shape, weight: Affine, bias: Affine, dtype: torch.dtype) -> bool:
    """Return True if `normalise` takes this call of a `Backend`."""
    return (
        x.is_cpu
        and x.dtype is dtype
        and CPU_TAKES_MIXED_DTYPES
        and (
            x.numel() >= SMALLEST or not (repeated.now or gradients.wants_gradient(x, weight, bias))
        )
        and gradients.takes(x, shape, weight, bias)
        and gradients.can_be_saved(x)
    )


def normalise(x: Tensor, shape: Shape, weight: Affine, bias: Affine, eps: float) -> Tensor:
    """Normalise a call that `takes` accepts."""
    if gradients.wants_gradient(x, weight, bias):
        y: Tensor = _LayerNorm.apply(x, shape, weight, bias, eps)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, shape, weight, bias, eps)[0]


def _forward(
    x: Tensor, shape: Shape, weight: Affine, bias: Affine, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in the dtype of x, and mean and rstd in float32."""
    scale, shift = gradients.scale_of(x, shape, weight), None if bias is None else bias.float()
    # It runs outside of autocast, as in the other backends: CUDA's lists, which tests put on the
    # CPU, would promote it.
    with autocast_disabled():
        return torch.native_layer_norm(x, shape, scale, shift, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Shape, weight: Affine, bias: Affine, eps: float
    ) -> Tensor:
        y, mean, rstd = _forward(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.shape = tuple(shape)  # the caller may change a list before backward
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        # Sums that are differentiated again, or mapped over, must not be changed in place.
        as_a_whole = (
            torch.is_grad_enabled()
            or forward_mode_is_on()
            or torch._C._are_functorch_transforms_active()
            # A hook on saved tensors may give x back in another dtype.
            or x.dtype is not dy.dtype
        )
        run = gradients.backward if as_a_whole else _backward_in_blocks
        dx, dweight, dbias = run(dy, x, ctx.shape, weight, mean, rstd, wanted)
        return dx, None, dweight, dbias, None


def _backward_in_blocks(
    dy: Tensor,
    x: Tensor,
    shape: Shape,
    weight: Affine,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `gradients.backward` in blocks, for a `dy` in the dtype of `x`.

    The mixed kernel rounds the gradient of x once. Only the sums over rows need float32, and only
    a block of x and dy is copied to it at a time.
    """
    scale = gradients.scale_of(x, shape, weight)
    dx = None
    if wanted[0]:
        mask = [True, False, False]
        dx = gradients.operator(dy, x, shape, mean, rstd, scale, scale, mask)[0]
    sums: list[Tensor | None] = [None, None]
    if wanted[1] or wanted[2]:
        n = math.prod(shape)
        row = scale.reshape(n)
        tensors = ((dy, n), (x, n), (mean, 1), (rstd, 1))
        rows = max(1, _BLOCK // n)
        blocks = (torch.split(t.reshape(-1, size), rows) for t, size in tensors)
        for block_dy, block_x, block_mean, block_rstd in zip(*blocks, strict=True):
            parts = gradients.backward(
                block_dy, block_x, (n,), row, block_mean, block_rstd, [False, *wanted[1:]]
            )[1:]
            for i, (total, part) in enumerate(zip(sums, parts, strict=True)):
                sums[i] = part if total is None or part is None else total.add_(part)
    dweight, dbias = (None if s is None else s.view(scale.shape) for s in sums)
    return dx, dweight, dbias


never_a_frame_of_its_own(takes)
for _function in (normalise, _LayerNorm.backward):
    never_a_frame_of_its_own(_function, nor_what_it_calls=True)
