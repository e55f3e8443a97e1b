"""Keeps for backward what the next layer keeps anyway: the output, and 1 / std of each row.

`recovery` says how the gradients stay right without x, and its limits.

Compiled code keeps y in place of x where there is neither weight nor bias. With a weight, whether
xhat can be recovered from y changes from step to step, and a graph cannot follow: native's graph it
is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch.backends import autograd, fused, native
from lpln_autopatch.backends.autograd import takes  # by name: `bench count` replaces these two
from lpln_autopatch.backends.lean import recovery
from lpln_autopatch.backends.lean.recovery import counter
from lpln_autopatch.backends.protocol import Affine, Backend, Shape
from lpln_autopatch.torch_compat import (
    TORCH_VERSION,
    autocast_disabled,
    never_a_frame_of_its_own,
    run_while_compiling,
)


def load() -> Backend:
    """`normalise`, or an ImportError: this torch is too old."""
    if TORCH_VERSION < (2, 1):
        raise ImportError(
            f"it needs torch 2.1 or later, this is {torch.__version__}. "
            "Update it, or name another backend."
        )
    return normalise


def normalise(
    x: Tensor, normalized_shape: Shape, weight: Affine, bias: Affine, eps: float, dtype: torch.dtype
) -> Tensor:
    """The lean `Backend`: keeps no x for backward where it can, and is native elsewhere.

    On CUDA the kernels of `fused` run it, where Triton is and they take the call; elsewhere
    PyTorch's. Nothing but the output is rounded, except that CUDA's own kernel takes an x in the
    autocast dtype with weight and bias rounded to it.
    """
    if _runs_kernels(x) and fused.takes(x, normalized_shape, weight, bias):
        return fused.run(x, normalized_shape, weight, bias, eps, dtype, recovery.plan)
    if not takes(x, normalized_shape, weight, bias):
        return native.normalise(x, normalized_shape, weight, bias, eps, dtype)
    arguments = x, tuple(normalized_shape), weight, bias, eps, dtype
    if not autograd.wants_gradient(x, weight, bias):
        return _normalise(*arguments)[0]
    y: Tensor = _LeanLayerNorm.apply(*arguments, autograd.stand_in_for(x))  # type: ignore[no-untyped-call]
    return y


def _runs_kernels(x: Tensor) -> bool:
    return x.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    try:
        fused.load()
    except ImportError:
        return False
    return True


def _normalise(
    x: Tensor, shape: Shape, weight: Affine, bias: Affine, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Affine, Affine, Tensor, Tensor]:
    """y, what the kernel took for x, weight and bias, and mean and rstd of each row."""
    computed_in = kernel_dtype(x, dtype)
    with autocast_disabled():
        x = x.to(dtype=computed_in)
        weight, bias = (t if t is None else t.to(dtype=computed_in) for t in (weight, bias))
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        return y.to(dtype=dtype), x, weight, bias, mean, rstd


def kernel_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernel takes its arguments in, all of them.

    CUDA's gives float32 statistics for any; those of other devices may give them in low precision.
    """
    return dtype if x.is_cuda and x.dtype is dtype else torch.float32


class _LeanLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: Shape,
        weight: Affine,
        bias: Affine,
        eps: float,
        dtype: torch.dtype,
        stand_in: Tensor | None,
    ) -> Tensor:
        normalised = _normalise(x, shape, weight, bias, eps, dtype)
        with autocast_disabled():
            kept = recovery.keep(*normalised, counter(weight))
        y, *_, rstd = normalised
        ctx.save_for_backward(*kept, rstd, weight)
        ctx.stand_in, ctx.shape = stand_in, shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, rstd, weight = ctx.saved_tensors
        with torch.no_grad():
            x = recovery.recover(*kept).div_(rstd)  # but for its mean, on which nothing depends
        # With create_graph, what comes out is differentiated again.
        x = autograd.in_place_of(ctx.stand_in, x)
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        mean = torch.zeros_like(rstd)
        dx, dweight, dbias = autograd.backward(dy, x, ctx.shape, weight, mean, rstd, wanted)
        return dx, None, dweight, dbias, None, None, None


def normalise_in_a_graph(
    x: Tensor, normalized_shape: Shape, weight: Affine, bias: Affine, eps: float, dtype: torch.dtype
) -> Tensor:
    """The same for compiled code, which keeps no x where y is xhat."""
    if weight is None and bias is None and x.requires_grad and _only_a_first_derivative():
        y: Tensor = _YIsXhat.apply(x, tuple(normalized_shape), eps, dtype)  # type: ignore[no-untyped-call]
        return y
    return native.lower(torch.layer_norm, x, normalized_shape, weight, bias, eps, dtype)


@run_while_compiling
def _only_a_first_derivative() -> bool:
    """Whether Dynamo traces for a plain backward, outside of the graph.

    It gives wrong second derivatives of any autograd function inside of one (2.13, with
    `trace_autograd_ops`), has no formula for functorch's, and an export shows the function.
    """
    import torch._dynamo.config as config

    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return not (
        getattr(config, "trace_autograd_ops", False)
        or torch._C._are_functorch_transforms_active()
        or exporting()
    )


class _YIsXhat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Shape, eps: float, dtype: torch.dtype) -> Tensor:
        y, _, rstd = torch.native_layer_norm(x.float(), shape, None, None, eps)
        y = y.to(dtype=dtype)
        ctx.save_for_backward(y, rstd)
        ctx.shape, ctx.dtype = shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, rstd = ctx.saved_tensors
        x, mean = y.float() / rstd, torch.zeros_like(rstd)
        # Without a weight of ones, which a graph would multiply by.
        dx, _, _ = autograd.operator(
            dy.float(), x, ctx.shape, mean, rstd, None, None, [True, False, False]
        )
        return dx.to(dtype=ctx.dtype), None, None, None


# Dynamo is not to look for graphs in any of this: code that it compiles takes another way.
for _function in (normalise, _LeanLayerNorm.backward):
    never_a_frame_of_its_own(_function, nor_what_it_calls=True)
never_a_frame_of_its_own(normalise_in_a_graph)
