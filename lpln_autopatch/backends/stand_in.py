"""What stands for an x that is not kept, in the graph of a second derivative."""

from __future__ import annotations

from typing import Any

import torch

from lpln_autopatch.torch_compat import never_a_frame_of_its_own


def stand_in_for(x: torch.Tensor) -> torch.Tensor | None:
    """A tensor of the shape of `x`, in four bytes, whose gradient is that of `x`; or None.

    None where `x` wants no gradient.
    """
    if not x.requires_grad:
        return None
    stand_in: torch.Tensor = _StandIn.apply(x)  # type: ignore[no-untyped-call]
    return stand_in


def in_place_of(stand_in: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """`value`, whose gradient goes to `stand_in`, if that is not None and gradients are on."""
    if stand_in is None or not torch.is_grad_enabled():
        return value
    result: torch.Tensor = _InPlaceOf.apply(value, stand_in)  # type: ignore[no-untyped-call]
    return result


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)  # in a first derivative it has none: no zeros, no sum
        return x.new_empty((), dtype=torch.float32).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> torch.Tensor | None:
        return None if gradient is None else gradient.to(dtype=ctx.dtype)


class _InPlaceOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, stand_in: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradient


for _function in (_StandIn.backward, _InPlaceOf.backward):
    never_a_frame_of_its_own(_function, nor_what_it_calls=True)
