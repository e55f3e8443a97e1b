"""The autograd function of the kernels: what is kept of a call, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpln_autopatch._torch_compat import (
    forward_mode_is_on,
    is_compiling,
    never_a_frame_of_its_own,
    something_intercepts_operators,
)
from lpln_autopatch.backends import gradients
from lpln_autopatch.backends.fused import recovery as rules
from lpln_autopatch.backends.fused.recovery import Recovery, Tally
from lpln_autopatch.backends.protocol import Affine

if TYPE_CHECKING:  # it imports Triton, which is optional and takes a while to import
    from lpln_autopatch.backends.fused.plan import Plan, Result

_TWICE = (
    "create_graph=True differentiates a norm twice that the backend 'fused' or 'lean' has "
    "normalised, and it keeps no x from which to do so. "
    'Normalise with backend="native" (LPLN_BACKEND=native).'
)


class FusedNorm(torch.autograd.Function):
    """A norm in one kernel forward, and one pass over dy and the kept tensor backward.

    It keeps one tensor for backward, and one or two float32 numbers a row. `fused` keeps x if it
    has a low precision, and else xhat = (x - mean) / std in the autocast dtype. `lean` keeps y if
    it can recover xhat from it, and else what `fused` keeps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Affine, bias: Affine, plan: Plan) -> Tensor:
        """Return y, and keep what backward needs."""
        is_xhat = weight is None and bias is None
        if plan.lean and not is_xhat and rules.can_count(weight):
            result = _recoverable(plan, x, weight, bias)
        else:
            keep = "xhat" if x.dtype is torch.float32 else "x"
            result = plan.forward(x, weight, bias, "y" if plan.lean and is_xhat else keep)
        y, kept, statistics, recovery = result
        if recovery is None:
            ctx.save_for_backward(kept, statistics, weight)
        else:
            tensors = bias, recovery.slots, recovery.reserved
            ctx.save_for_backward(kept, statistics, weight, *tensors)
        ctx.plan, ctx.is_x = plan, kept is x
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients in the kernels, or in operators where these cannot run."""
        plan: Plan = ctx.plan
        saved: tuple[Any, ...] = ctx.saved_tensors
        kept, statistics, weight, *rest = saved
        bias, recovery = (rest[0], Recovery(*rest[1:])) if rest else (None, None)
        wanted = ctx.needs_input_grad[:3]
        twice = torch.is_grad_enabled()
        if twice and not ctx.is_x:
            raise RuntimeError(_TWICE)
        gradients: Sequence[Tensor | None]
        if not twice and _kernels_take(plan, ctx.is_x, dy, saved):
            arguments = dy, kept, statistics, weight, bias, recovery, wanted, ctx.is_x
            gradients = plan.backward(*arguments)
        else:
            if ctx.is_x:
                xhat, rstd = _from_x(kept, plan.n_dims, plan.eps, plan.centred)
            else:
                rstd = statistics[0].view(*kept.shape[: -plan.n_dims], *[1] * plan.n_dims)
                xhat = _recovered(kept, weight, bias, recovery, dy.dtype)
            found = _gradients(dy, xhat, rstd, plan.n_dims, weight, wanted, plan.centred)
            # Compiled autograd does not cast them (torch 2.6).
            gradients = [
                each if each is None else each.to(dtype)
                for each, dtype in zip(found, plan.dtypes, strict=True)
            ]
        return *gradients, None


# Without what `FusedNorm.apply` does for the tensors of functorch, which no plan takes.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, FusedNorm).apply


def normalise(plan: Plan, x: Tensor, weight: Affine, bias: Affine) -> Tensor:
    """Normalise `x`, and have autograd record it if a gradient is wanted."""
    if gradients.wants_gradient(x, weight, bias):
        return _apply(x, weight, bias, plan)
    return plan.forward(x, weight, bias).y


def _recoverable(plan: Plan, x: Tensor, weight: Tensor, bias: Affine) -> Result:
    """Run a call of `lean` with parameters, whose xhat backward finds in y or not."""
    tally = rules.tally_of(weight)
    if tally is not None:
        counts = tally.turn()
        keep = "y" if tally.allows_y(plan.slots) else "xhat"
        result = plan.forward(x, weight, bias, keep, counts)
        tally.send(counts[0], plan.rows)
        return result
    tally = Tally(weight)
    result = plan.forward(x, weight, bias, "y", tally.turn())
    if not tally.wait(plan.slots, plan.rows):
        result = plan.forward(x, weight, bias, "xhat", tally.turn())
    if plan.counts_arrive_late:
        rules.remember(weight, tally)
    return result


def _kernels_take(plan: Plan, is_x: bool, dy: Tensor, saved: Sequence[Tensor | None]) -> bool:
    """Return True if the kernels can run on the tensors that autograd hands to backward."""
    # Compiled autograd traces backward.
    if is_compiling() or forward_mode_is_on() or something_intercepts_operators():
        return False
    if dy.dtype is not plan.dtype or not is_what_lies_in_memory(dy):
        return False
    # Hooks on saved tensors may give back anything, and `.data` may be another's since forward.
    for tensor, (dtype, size) in zip(saved, plan.saved[is_x], strict=False):
        if tensor is not None and not (
            tensor.dtype is dtype
            and tensor.numel() == size
            and tensor.get_device() == dy.get_device()
            and type(tensor) in gradients.PLAIN
            and not tensor.is_neg()
            and (tensor.is_contiguous() or tensor is saved[0])  # Its strides are looked at.
        ):
            return False
    kept = saved[0]
    return kept is not None and kept.shape == dy.shape


def is_what_lies_in_memory(tensor: Tensor) -> bool:
    """Return True if the memory of `tensor` holds its values.

    It does not for a subclass, a negative view, a zero without memory, and a batch of vmap.
    """
    if type(tensor) not in gradients.PLAIN:
        return False
    return torch._C._dispatch_keys(tensor).raw_repr() in _plain_keys(tensor.is_cuda)


@functools.cache
def _plain_keys(is_cuda: bool) -> frozenset[int]:
    device = "cuda" if is_cuda else "cpu"
    normal = torch.empty(0, device=device)
    with torch.inference_mode():
        inference = torch.empty(0, device=device)
    return frozenset(torch._C._dispatch_keys(tensor).raw_repr() for tensor in (normal, inference))


def _from_x(x: Tensor, n_dims: int, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """Return xhat and 1 / sqrt(variance + eps), as functions of `x`."""
    dims = tuple(range(-n_dims, 0))
    x = x.float()
    if centred:
        x = x - x.mean(dims, keepdim=True)
    rstd = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def _recovered(
    kept: Tensor, weight: Affine, bias: Affine, recovery: Recovery | None, dtype: torch.dtype
) -> Tensor:
    """Return xhat in float32, recovered as in the kernels."""
    if recovery is None or weight is None:
        return kept.float()
    slots, limits = recovery.slots.long(), torch.finfo(dtype)
    flat = kept.reshape(-1, slots.numel()).float()
    scale = weight.reshape(-1).float()
    shift = torch.zeros_like(scale) if bias is None else bias.reshape(-1).float()
    known = scale.abs() > limits.eps * (shift.abs() + limits.smallest_normal)
    from_y = (flat - shift) * torch.where(known, 1 / scale, 0.0)
    own = recovery.reserved.float().index_select(1, slots.clamp(min=0))
    return torch.where(slots >= 0, own, torch.where(slots == -1, from_y, flat)).view(kept.shape)


def _gradients(
    dy: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    n_dims: int,
    weight: Affine,
    wanted: Sequence[bool],
    centred: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of x, weight and bias in operators that can be differentiated again.

    They are float32, and autograd casts each to its tensor's dtype.
    """
    dims, shape = tuple(range(-n_dims, 0)), xhat.shape[-n_dims:]
    dy = dy.float()
    g = dy if weight is None else dy * weight
    dx = dweight = dbias = None
    if wanted[0]:
        dx = g - xhat * (g * xhat).mean(dims, keepdim=True)
        if centred:
            dx = dx - g.mean(dims, keepdim=True)
        dx = dx * rstd
    if wanted[1]:
        dweight = (dy * xhat).reshape(-1, *shape).sum(0)
    if wanted[2]:
        dbias = dy.reshape(-1, *shape).sum(0)
    return dx, dweight, dbias


# Dynamo must not look for graphs here: code that it compiles is native's.
never_a_frame_of_its_own(FusedNorm.backward, nor_what_it_calls=True)
