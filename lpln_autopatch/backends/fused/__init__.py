"""One Triton kernel forward, and one pass over x and dy backward.

x is read once in its own dtype, y is written once in the autocast dtype; nothing is cast outside
of the kernels. A low-precision x itself is what is saved for backward, with two float32 for each
row; for a float32 x that is xhat = (x - mean) / std in the autocast dtype, half the bytes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch.backends import autograd, native
from lpln_autopatch.backends.autograd import NO_RECOVERY, Recovery
from lpln_autopatch.backends.protocol import Affine, Backend, Shape
from lpln_autopatch.torch_compat import (
    TORCH_VERSION,
    forward_mode_is_on,
    never_a_frame_of_its_own,
    something_intercepts_operators,
)

MAX_FEATURES = 65536
"""The longest row that the kernels take, in elements."""


def load() -> Backend:
    """`normalise`, if Triton is here.

    Raises:
        ImportError: it is not, or this torch is too old, or for ROCm. What to do.
    """
    if TORCH_VERSION < (2, 6):
        raise ImportError(
            f"it needs torch 2.6 or later, this is {torch.__version__}. "
            "Update it, or name another backend."
        )
    if torch.version.hip is not None:
        raise ImportError("it is not for ROCm. Name another backend.")
    try:
        launcher()
    except ImportError as error:
        raise ImportError(
            f"Triton cannot be imported ({error}). It comes with the CUDA builds "
            "of torch; elsewhere: pip install triton"
        ) from error
    return normalise


@functools.cache
def launcher() -> Any:
    """The module that launches the kernels."""
    # Not at the top: Triton is optional, and takes a while to import.
    return importlib.import_module("lpln_autopatch.backends.fused.launch")


def normalise(
    x: Tensor, normalized_shape: Shape, weight: Affine, bias: Affine, eps: float, dtype: torch.dtype
) -> Tensor:
    """The fused `Backend`: one kernel where it can, natively elsewhere. `takes` has the rule.

    Nothing but the output is rounded: it is the float32 result, rounded once. The gradients of a
    float32 x and of weight are computed from xhat rounded to `dtype`.
    """
    if not takes(x, normalized_shape, weight, bias):
        return native.normalise(x, normalized_shape, weight, bias, eps, dtype)
    return run(x, normalized_shape, weight, bias, eps, dtype, _keeps_input)


Plan = Callable[[Tensor, Affine, Affine, int, torch.dtype], tuple[str, Recovery]]
"""What a call keeps for backward, "x", "xhat" or "y", and how xhat comes out of a y.

From x, weight, bias, the number of rows, and the dtype of y.
"""


def _keeps_input(
    x: Tensor, weight: Affine, bias: Affine, rows: int, dtype: torch.dtype
) -> tuple[str, Recovery]:
    return "xhat" if x.dtype is torch.float32 else "x", NO_RECOVERY


def run(
    x: Tensor,
    normalized_shape: Shape,
    weight: Affine,
    bias: Affine,
    eps: float,
    dtype: torch.dtype,
    plan: Plan,
) -> Tensor:
    """The kernels, for what `takes` says that they take."""
    arguments = x, len(normalized_shape), weight, bias, eps, dtype
    y: Tensor
    if autograd.wants_gradient(x, weight, bias):
        with torch.no_grad():
            keeps, recovery = plan(
                x, weight, bias, x.shape[: -len(normalized_shape)].numel(), dtype
            )
        stand_in = None if keeps == "x" else autograd.stand_in_for(x)
        y = _FusedLayerNorm.apply(*arguments, keeps, recovery, stand_in)  # type: ignore[no-untyped-call]
    else:
        y = launcher().forward(*arguments, None, None)
    return y


def takes(x: Tensor, shape: Shape, weight: Affine, bias: Affine) -> bool:
    """Whether the kernels can take this call."""
    return (
        (x.is_cuda or (x.is_cpu and launcher().INTERPRETED))
        # A TorchDispatchMode (FakeTensorMode, ...) would not see the kernels.
        and not something_intercepts_operators()
        and autograd.takes(x, shape, weight, bias)
        and autograd.can_be_saved(x)
        and _is_what_lies_in_memory(x)
        and x.shape[-len(shape) :].numel() <= MAX_FEATURES
        and all(p is None or (p.is_contiguous() and not p.is_neg()) for p in (weight, bias))
    )


def _is_what_lies_in_memory(tensor: Tensor) -> bool:
    """Whether `tensor` is no subclass, negative view, zero without memory, batch, ..."""
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return type(tensor) in autograd.PLAIN and keys in _plain_keys(tensor.is_cuda)


@functools.cache
def _plain_keys(is_cuda: bool) -> frozenset[int]:
    device = "cuda" if is_cuda else "cpu"
    normal = torch.empty(0, device=device)
    with torch.inference_mode():
        inference = torch.empty(0, device=device)
    return frozenset(torch._C._dispatch_keys(tensor).raw_repr() for tensor in (normal, inference))


class _FusedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        n_dims: int,
        weight: Affine,
        bias: Affine,
        eps: float,
        dtype: torch.dtype,
        keeps: str,
        recovery: Recovery,
        stand_in: Tensor | None,
    ) -> Tensor:
        statistics = x.new_empty((2, x.shape[:-n_dims].numel()), dtype=torch.float32)
        xhat = None
        if keeps == "xhat":
            xhat = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        y: Tensor = launcher().forward(
            x, n_dims, weight, bias, eps, dtype, statistics, xhat, recovery
        )
        kept = {"x": x, "xhat": xhat, "y": y}[keeps]
        ctx.save_for_backward(kept, weight, bias, statistics, *recovery)
        ctx.n_dims, ctx.is_x, ctx.dtype, ctx.stand_in = n_dims, keeps == "x", x.dtype, stand_in
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, bias, statistics, *recovery = ctx.saved_tensors
        n_dims = ctx.n_dims
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        if (
            # With create_graph, what comes out is differentiated again: the kernels cannot be.
            torch.is_grad_enabled()
            or forward_mode_is_on()
            or something_intercepts_operators()
            # What hooks on saved tensors give back may be anything of the right shape.
            or not all(
                t is None or _is_what_lies_in_memory(t)
                for t in (dy, kept, weight, statistics, *recovery)
            )
            or not all(t is None or t.is_contiguous() for t in (weight, statistics, *recovery))
        ):
            shape = kept.shape[-n_dims:]
            x, (mean, rstd) = kept, statistics.view(2, *kept.shape[:-n_dims], *[1] * n_dims)
            if not ctx.is_x:
                with torch.no_grad():
                    x = _xhat(kept, *recovery) / rstd  # but for its mean, on which nothing depends
                x, mean = autograd.in_place_of(ctx.stand_in, x), torch.zeros_like(mean)
            gradients = autograd.backward(dy, x, shape, weight, mean, rstd, wanted)
        else:
            arguments = dy, kept, n_dims, weight, bias, statistics, wanted, ctx.dtype
            gradients = launcher().backward(*arguments, not ctx.is_x, recovery)
        dx, dweight, dbias = gradients
        return dx, None, dweight, dbias, None, None, None, None, None


def _xhat(kept: Tensor, recovery: Tensor | None, reserved: Tensor | None) -> Tensor:
    """What the kernels take for xhat, in float32."""
    if recovery is None or reserved is None:
        return kept.float()
    shift, inverse, slots = recovery[:-1].view(3, -1)
    recovered = (kept.reshape(-1, slots.numel()) - shift) * inverse
    own = reserved.float().index_select(1, slots.clamp(min=0).long())
    return torch.where(slots >= 0, own, recovered).view(kept.shape)


# Dynamo is not to look for graphs in any of this: code that it compiles takes another way.
for _function in (normalise, _FusedLayerNorm.backward):
    never_a_frame_of_its_own(_function, nor_what_it_calls=True)
