"""What the backends that have an autograd function of their own share.

The calls that they take, LayerNorm's gradients, and what stands for an x that is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch.backends.protocol import Affine, Shape
from lpln_autopatch.torch_compat import forward_mode_is_on, never_a_frame_of_its_own

PLAIN = frozenset({Tensor, torch.nn.Parameter})
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Recovery = tuple[Tensor, Tensor] | tuple[None, None]
"""How the kernels get xhat from y: their arguments recovery and reserved."""

NO_RECOVERY: Recovery = (None, None)

operator = torch.ops.aten.native_layer_norm_backward.default


def takes(x: Tensor, shape: Shape, weight: Affine, bias: Affine) -> bool:
    """Whether an autograd function can take this call of a `Backend`; native takes every one."""
    # PyTorch's own error for an integer, for another shape and for none.
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    return (
        type(x) in PLAIN
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and not x.is_nested
        and len(shape) > 0
        and x.shape[-len(shape) :] == shape
        and x.numel() > 0
        and all(
            parameter is None
            or (
                type(parameter) in PLAIN
                and parameter.dtype in DTYPES
                and parameter.shape == shape
                and parameter.device == x.device
            )
            for parameter in (weight, bias)
        )
        # An autograd function has no formula for these two.
        and not torch._C._are_functorch_transforms_active()
        and not forward_mode_is_on()
    )


def can_be_saved(x: Tensor) -> bool:
    """Whether autograd can save `x`: not an inference tensor, of which stock makes a copy."""
    return not (x.is_inference() and torch.is_grad_enabled())


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def backward(
    dy: Tensor,
    x: Tensor,
    shape: Shape,
    weight: Affine,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias in float32; autograd casts each to its tensor's dtype.

    In operators of PyTorch's, which know their own derivatives.

    Args:
        dy: The gradient of the output, shape of `x`, any dtype.
        x: Input, shape (..., *shape).
        shape: The trailing dimensions that were normalised.
        weight: Scale, or None.
        mean: Of each row, float32, shape (..., 1, ..., 1).
        rstd: 1 / sqrt(variance + eps), the same.
        wanted: Which gradients are computed: of x, weight and bias. The others are None.
    """
    scale = scale_of(x, shape, weight)
    # The second one is for bias, of which it takes the shape.
    dx, dweight, dbias = operator(
        dy.float(), x.float(), shape, mean, rstd, scale, scale, list(wanted)
    )
    return dx, dweight, dbias


def scale_of(x: Tensor, shape: Shape, weight: Affine) -> Tensor:
    """`weight` in float32, or ones for none.

    Without a float32 parameter PyTorch's mixed kernel on CPU rounds mean and rstd, and with a bias
    alone PyTorch's own double backward fails (torch 2.13, 2.15).
    """
    return x.new_ones(tuple(shape), dtype=torch.float32) if weight is None else weight.float()


def stand_in_for(x: Tensor) -> Tensor | None:
    """What stands for an `x` that is not kept, in the graph of a second derivative.

    A tensor of its shape, in four bytes, whose gradient is that of `x`. None if that wants none.
    """
    if not x.requires_grad:
        return None
    stand_in: Tensor = _StandIn.apply(x)  # type: ignore[no-untyped-call]
    return stand_in


def in_place_of(stand_in: Tensor | None, value: Tensor) -> Tensor:
    """`value`, whose gradient goes to `stand_in`, if that is not None and gradients are on."""
    if stand_in is None or not torch.is_grad_enabled():
        return value
    result: Tensor = _InPlaceOf.apply(value, stand_in)  # type: ignore[no-untyped-call]
    return result


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # in a first derivative it has none: no zeros, no sum
        return x.new_empty((), dtype=torch.float32).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return gradient  # autograd casts it to the dtype of x


class _InPlaceOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


never_a_frame_of_its_own(can_be_saved)
for _function in (takes, _StandIn.backward, _InPlaceOf.backward):
    never_a_frame_of_its_own(_function, nor_what_it_calls=True)
