"""LayerNorm of a large low-precision x on CPU: PyTorch's mixed kernel, with sums in float32.

That kernel reads x in its own dtype, computes in float32 and rounds once, and x itself is what is
kept for backward. But its own backward sums the gradients of weight and bias in x's dtype, 7 % off
at 4096 rows of bfloat16 and 26 % at 65536 (torch 2.13 and 2.15). So here backward sums them up in
float32, over copies of a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lpln_autopatch.torch_compat import (
    CPU_TAKES_MIXED_DTYPES,
    autocast_disabled,
    forward_mode_is_on,
    never_a_frame_of_its_own,
)

SMALLEST = 1 << 19
"""The elements of the smallest x that is taken.

An autograd function in Python costs some 30 microseconds a call. For a smaller x an upcast costs
less, and the float32 copy that it keeps is below 2 MiB.
"""

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_PARAMETER_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_BLOCK = 1 << 18  # elements of what is copied to float32 at a time: two copies fit into a cache
_operator = torch.ops.aten.native_layer_norm_backward.default

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def takes(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether `normalise` takes this call, whether or not gradients are wanted.

    The arguments are those of `lpln_autopatch.backends.Backend`.
    """
    return (
        x.is_cpu
        and x.dtype is dtype
        and x.numel() >= SMALLEST
        and CPU_TAKES_MIXED_DTYPES
        and type(x) in _PLAIN
        and (weight is None or (type(weight) in _PLAIN and weight.dtype in _PARAMETER_DTYPES))
        and (bias is None or (type(bias) in _PLAIN and bias.dtype in _PARAMETER_DTYPES))
        # The autograd function has no formula for functorch's transforms and for forward mode.
        and not torch._C._are_functorch_transforms_active()
        and not forward_mode_is_on()
        # Autograd cannot save it; a copy in float32, as stock makes of it, it can.
        and not (x.is_inference() and torch.is_grad_enabled())
    )


def normalise(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise what `takes` takes, with the same values whether or not gradients are wanted.

    Arguments and result are those of `lpln_autopatch.backends.Backend`.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        y: torch.Tensor = _LayerNorm.apply(x, normalized_shape, weight, bias, eps)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, normalized_shape, weight, bias, eps)[0]


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    wanted: Sequence[bool],
) -> Gradients:
    """The gradients of x, weight and bias, each in its own dtype, computed in float32.

    In operators of PyTorch's, which know their own derivatives.

    Args:
        dy: The gradient of the output, shape of `x`, any dtype.
        x: Input, shape (..., *shape).
        shape: The trailing dimensions that were normalised.
        weight: Scale, or None.
        bias: Shift, or None.
        mean: Of each row, float32, shape (..., 1, ..., 1).
        rstd: 1 / sqrt(variance + eps), the same.
        wanted: Which gradients are computed: of x, weight and bias. The others are None.
    """
    dx, dweight, dbias = _operator(
        dy.float(),
        x.float(),
        shape,
        mean,
        rstd,
        _scale(x, shape, weight),
        None if bias is None else bias.float(),
        wanted,
    )
    return _in_dtype_of(x, dx), _in_dtype_of(weight, dweight), _in_dtype_of(bias, dbias)


def _backward_without_copies(
    dy: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    wanted: Sequence[bool],
) -> Gradients:
    """The same for a `dy` in the dtype of `x`, with float32 copies of a block of rows alone.

    The gradient of x is rounded once by the mixed kernel. Only the sums over rows need float32.
    """
    scale = _scale(x, shape, weight)
    # The kernel looks at the dtypes of what it does not compute too.
    shift = None if bias is None else bias.float()
    dx = dweight = dbias = None
    if wanted[0]:
        mask = [True, False, False]
        dx = _operator(dy, x, shape, mean, rstd, scale, shift, mask)[0]
    if wanted[1] or wanted[2]:
        dweight, dbias = _sums_over_rows(dy, x, math.prod(shape), mean, rstd, scale)
        dweight, dbias = dweight.view(scale.shape), dbias.view(scale.shape)
    return (
        dx,
        _in_dtype_of(weight, dweight) if wanted[1] else None,
        _in_dtype_of(bias, dbias) if wanted[2] else None,
    )


def _sums_over_rows(
    dy: torch.Tensor,
    x: torch.Tensor,
    n: int,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of weight and bias, float32, shape (n,)."""
    rows = max(1, _BLOCK // n)
    scale = scale.reshape(n)
    tensors = ((dy, n), (x, n), (mean, 1), (rstd, 1))
    total: list[torch.Tensor] = []
    for block in zip(*(torch.split(t.reshape(-1, size), rows) for t, size in tensors), strict=True):
        block_dy, block_x, block_mean, block_rstd = block
        mask = [False, True, True]
        _, dweight, dbias = _operator(
            block_dy.float(), block_x.float(), (n,), block_mean, block_rstd, scale, scale, mask
        )
        if total:
            total[0].add_(dweight)
            total[1].add_(dbias)
        else:
            total = [dweight, dbias]
    return total[0], total[1]


def _in_dtype_of(tensor: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None or tensor is None else gradient.to(dtype=tensor.dtype)


def _scale(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None) -> torch.Tensor:
    # Ones for no weight: without a float32 parameter the forward kernel rounds mean and rstd, and
    # with a bias alone PyTorch's own double backward fails (torch 2.13, 2.15).
    return x.new_ones(tuple(shape), dtype=torch.float32) if weight is None else weight.float()


def _forward(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y in the dtype of x, mean and rstd in float32."""
    shift = None if bias is None else bias.float()
    # Outside of autocast, as the other backends: tests put CUDA's lists, which promote it, on CPU.
    with autocast_disabled():
        return torch.native_layer_norm(x, shape, _scale(x, shape, weight), shift, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shape: Sequence[int],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        y, mean, rstd = _forward(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        # What is differentiated again, or mapped over, must not be written into.
        as_a_whole = (
            torch.is_grad_enabled()
            or forward_mode_is_on()
            or torch._C._are_functorch_transforms_active()
            # A hook on saved tensors may give x back in another dtype.
            or x.dtype is not dy.dtype
        )
        run = backward if as_a_whole else _backward_without_copies
        dx, dweight, dbias = run(dy, x, ctx.shape, weight, bias, mean, rstd, wanted)
        return dx, None, dweight, dbias, None


for _function in (takes, normalise, _LayerNorm.backward):
    never_a_frame_of_its_own(_function)
