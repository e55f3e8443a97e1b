"""The autograd function of the kernels: what is kept of a call, and its gradients."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

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
from lpln_autopatch.backends.fused.recovery import Recovery
from lpln_autopatch.backends.protocol import Affine

_TWICE = (
    "create_graph=True differentiates a norm twice that the backend 'fused' or 'lean' has "
    "normalised, and it keeps no x from which to do so. "
    'Normalise with backend="native" (LPLN_BACKEND=native).'
)


@functools.cache
def launcher() -> Any:
    """Import the module that launches the kernels."""
    # It is imported here, not at the top: Triton is optional, and takes a while to import.
    return importlib.import_module("lpln_autopatch.backends.fused.launch")


class FusedNorm(torch.autograd.Function):
    """A norm in one kernel forward, and one pass over dy and the kept tensor backward.

    It keeps one tensor for backward, and one or two float32 numbers a row. `fused` keeps x if it
    has a low precision, and else xhat = (x - mean) / std in the autocast dtype. `lean` keeps y if
    it can recover xhat from it, and else what `fused` keeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Affine,
        bias: Affine,
        n_dims: int,
        eps: float,
        dtype: torch.dtype,
        centred: bool,
        lean: bool,
    ) -> Tensor:
        """Return y, and keep what backward needs."""
        arguments = x, n_dims, weight, bias, eps, dtype, centred
        rows = x.shape[:-n_dims].numel()
        is_xhat = weight is None and bias is None
        recovery = None
        if lean and not is_xhat and rules.can_count(weight):
            y, kept, statistics, recovery = _keep_y(arguments, rows)
        elif lean and is_xhat:
            statistics = x.new_empty(1, rows, dtype=torch.float32)
            kept = y = launcher().forward(*arguments, statistics)
        elif x.dtype is torch.float32:
            y, kept, statistics = _keep_xhat(arguments, rows, None)
        else:
            kept = x
            statistics = x.new_empty(1 + centred, rows, dtype=torch.float32)
            y = launcher().forward(*arguments, statistics)
        if recovery is None:
            ctx.save_for_backward(kept, weight, statistics)
        else:
            ctx.save_for_backward(kept, weight, statistics, bias, recovery.slots, recovery.reserved)
        ctx.n_dims, ctx.eps, ctx.centred, ctx.is_x = n_dims, eps, centred, kept is x
        ctx.dtypes = [torch.float32 if t is None else t.dtype for t in (x, weight, bias)]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients in the kernels, or in operators where these cannot run."""
        kept, weight, statistics, *rest = ctx.saved_tensors
        bias, recovery = None, None
        if rest:
            bias, recovery = rest[0], Recovery(rest[1], rest[2])
        wanted = ctx.needs_input_grad[:3]
        twice = torch.is_grad_enabled()
        if twice and not ctx.is_x:
            raise RuntimeError(_TWICE)
        gradients: Sequence[Tensor | None]
        if twice or not _kernels_take(dy, kept, weight, *rest):
            if ctx.is_x:
                xhat, rstd = _from_x(kept, ctx.n_dims, ctx.eps, ctx.centred)
            else:
                rstd = statistics[0].view(*kept.shape[: -ctx.n_dims], *[1] * ctx.n_dims)
                xhat = _recovered(kept, weight, bias, recovery, dy.dtype)
            found = _gradients(dy, xhat, rstd, ctx.n_dims, weight, wanted, ctx.centred)
            # Compiled autograd does not cast them (torch 2.6).
            gradients = [
                each if each is None else each.to(dtype)
                for each, dtype in zip(found, ctx.dtypes, strict=True)
            ]
        else:
            arguments = dy, kept, ctx.n_dims, weight, bias, statistics, wanted
            gradients = launcher().backward(*arguments, ctx.dtypes, ctx.centred, ctx.is_x, recovery)
        return *gradients, None, None, None, None, None


def _keep_xhat(
    arguments: tuple[Any, ...], rows: int, *recovery: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x, dtype = arguments[0], arguments[5]
    statistics = x.new_empty(1, rows, dtype=torch.float32)
    xhat = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return launcher().forward(*arguments, statistics, xhat, *recovery), xhat, statistics


def _keep_y(arguments: tuple[Any, ...], rows: int) -> tuple[Tensor, Tensor, Tensor, Recovery]:
    """Run a call of `lean`. Return y, the kept tensor, statistics and recovery."""
    launch = launcher()
    x, _, weight, bias, _, dtype, _ = arguments
    recovery = Recovery.empty(weight, rows, dtype)
    slots = recovery.reserved.shape[1]
    late = launch.COUNTS_ARRIVE_LATE
    tally = rules.tallies().get(weight) if late else None
    counts = x.new_empty(2, dtype=torch.int32) if tally is None else tally.counts
    choose = functools.partial(
        launch.choose_slots, weight, bias, recovery, counts, dtype, rules.WORST_RATIO
    )
    keeps_y = tally is None or tally.allows_y(slots)
    choose(keeps_y)
    if keeps_y:
        statistics = x.new_empty(1, rows, dtype=torch.float32)
        kept = y = launch.forward(*arguments, statistics, None, recovery, counts)
    else:
        y, kept, statistics = _keep_xhat(arguments, rows, recovery, counts)
    if tally is not None:
        tally.send(rows)
    elif not rules.is_recoverable(counts, slots, rows):
        choose(False)
        y, kept, statistics = _keep_xhat(arguments, rows, recovery, counts)
    if tally is None and late:
        rules.tallies()[weight] = rules.Tally.first(counts, rows)
    return y, kept, statistics, recovery


def _kernels_take(*tensors: Tensor | None) -> bool:
    """Return True if the kernels can run on the tensors that autograd hands to backward."""
    # Compiled autograd traces backward.
    if is_compiling() or forward_mode_is_on() or something_intercepts_operators():
        return False
    for i, t in enumerate(tensors):
        # Hooks on saved tensors may give back anything of the right shape. The kernels know the
        # strides of the first two tensors, dy and the kept one.
        if t is not None and not (is_what_lies_in_memory(t) and (i < 2 or t.is_contiguous())):
            return False
    return True


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
