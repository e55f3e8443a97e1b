"""One Triton kernel forward, and one pass over x and dy backward.

x is read once in its own dtype, y is written once in the autocast dtype; nothing is cast outside
of the kernels. A low-precision x itself is what is saved for backward, with two float32 for each
row; for a float32 x that is xhat = (x - mean) / std in the autocast dtype, half the bytes.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch.backends import autograd, native
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
        _launch()
    except ImportError as error:
        raise ImportError(
            f"Triton cannot be imported ({error}). It comes with the CUDA builds "
            "of torch; elsewhere: pip install triton"
        ) from error
    return normalise


@functools.cache
def _launch() -> Any:
    # Not at the top: Triton is optional, and takes a while to import.
    return importlib.import_module("lpln_autopatch.backends.fused.launch")


def normalise(
    x: Tensor, normalized_shape: Shape, weight: Affine, bias: Affine, eps: float, dtype: torch.dtype
) -> Tensor:
    """The fused `Backend`: one kernel where it can, natively elsewhere. `_takes` has the rule.

    Nothing but the output is rounded: it is the float32 result, rounded once. The gradients of a
    float32 x and of weight are computed from xhat rounded to `dtype`.
    """
    if not _takes(x, normalized_shape, weight, bias):
        return native.normalise(x, normalized_shape, weight, bias, eps, dtype)
    arguments = x, len(normalized_shape), weight, bias, eps, dtype
    y: Tensor
    if autograd.wants_gradient(x, weight, bias):
        keeps_xhat = x.dtype is torch.float32
        stand_in = autograd.stand_in_for(x) if keeps_xhat else None
        y = _FusedLayerNorm.apply(*arguments, keeps_xhat, stand_in)  # type: ignore[no-untyped-call]
    else:
        y = _launch().forward(*arguments, None, None)
    return y


def _takes(x: Tensor, shape: Shape, weight: Affine, bias: Affine) -> bool:
    return (
        (x.is_cuda or (x.is_cpu and _launch().INTERPRETED))
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
        keeps_xhat: bool,
        stand_in: Tensor | None,
    ) -> Tensor:
        statistics = x.new_empty((2, x.shape[:-n_dims].numel()), dtype=torch.float32)
        xhat = None
        if keeps_xhat:
            xhat = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        y: Tensor = _launch().forward(x, n_dims, weight, bias, eps, dtype, statistics, xhat)
        ctx.save_for_backward(x if xhat is None else xhat, weight, bias, statistics)
        ctx.n_dims, ctx.is_xhat, ctx.stand_in = n_dims, keeps_xhat, stand_in
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        n_dims, is_xhat = ctx.n_dims, ctx.is_xhat
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        if (
            # With create_graph, what comes out is differentiated again: the kernels cannot be.
            torch.is_grad_enabled()
            or forward_mode_is_on()
            or something_intercepts_operators()
            # What hooks on saved tensors give back may be anything of the right shape.
            or not all(t is None or _is_what_lies_in_memory(t) for t in (dy, x, weight, statistics))
            or not (weight is None or weight.is_contiguous())
            or not statistics.is_contiguous()
        ):
            shape = x.shape[-n_dims:]
            mean, rstd = statistics.view(2, *x.shape[:-n_dims], *[1] * n_dims)
            if is_xhat:  # x, but for its mean, on which no derivative depends
                x, mean = autograd.in_place_of(ctx.stand_in, x / rstd), torch.zeros_like(mean)
            gradients = autograd.backward(dy, x, shape, weight, mean, rstd, wanted)
        else:
            arguments = dy, x, n_dims, weight, bias, statistics, wanted, is_xhat
            gradients = _launch().backward(*arguments)
        dx, dweight, dbias = gradients
        return dx, None, dweight, dbias, None, None, None, None


# Dynamo is not to look for graphs in any of this: code that it compiles takes another way.
for _function in (normalise, _FusedLayerNorm.backward):
    never_a_frame_of_its_own(_function, nor_what_it_calls=True)
