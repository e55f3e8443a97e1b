"""PyTorch's own kernels.

Casts are spelled `.to(dtype=dtype)`: `.to(dtype)`, which torch first tries to read as a device,
makes the whole call 6 % slower (torch 2.13, 8x64 on CPU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lpln_autopatch._torch_compat import (
    CUDA_NORMALISES_BFLOAT16,
    GRAPHS_KEEP_ROUNDED_INPUTS,
    autocast_disabled,
    is_compiling,
    is_exporting,
    never_a_frame_of_its_own,
)
from lpln_autopatch.backends import cpu
from lpln_autopatch.backends.gradients import DTYPES, can_be_saved
from lpln_autopatch.backends.protocol import Affine, Shape

Operator = Callable[..., Tensor]
"""A norm as PyTorch has it: of x, its second argument, weight, bias and eps."""


def normalise(
    x: Tensor, normalized_shape: Shape, weight: Affine, bias: Affine, eps: float, dtype: torch.dtype
) -> Tensor:
    """Normalise as a `Backend`: run PyTorch's LayerNorm, as `lower` does."""
    f32 = torch.float32
    if x.is_cpu and x.dtype is f32 and (weight is None or weight.dtype is f32):
        # `lower` does the same. Its checks would take 6 % of the time of a small call.
        if not is_compiling():
            return torch.layer_norm(x, normalized_shape, weight, bias, eps).to(dtype=dtype)
    elif cpu.takes(x, normalized_shape, weight, bias, dtype):
        return cpu.normalise(x, normalized_shape, weight, bias, eps)
    # The operator, not torch.nn.functional.layer_norm, which is wrapped.
    return lower(torch.layer_norm, x, normalized_shape, weight, bias, eps, dtype)


def rms_norm(
    x: Tensor, normalized_shape: Shape, weight: Affine, eps: float, dtype: torch.dtype
) -> Tensor:
    """Run PyTorch's RMSNorm, as `lower` does."""
    return lower(_rms_norm, x, normalized_shape, weight, None, eps, dtype)


def _rms_norm(x: Tensor, normalized_shape: Shape, weight: Affine, bias: None, eps: float) -> Tensor:
    return torch.rms_norm(x, normalized_shape, weight, eps)


def lower(
    operator: Operator,
    x: Tensor,
    what: object,
    weight: Affine,
    bias: Affine,
    eps: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Run any norm in the autocast dtype: in float32, rounded once, or in low precision.

    On CPU nothing is rounded before the output: closer than Composer's recipe, and faster, with
    no cast but the output's, and the caller's own float32 x saved for backward. A low-precision x
    is upcast: PyTorch's kernels for one sum the gradients of weight and bias in x's dtype. (A
    large one of a LayerNorm never gets here: `cpu` has a better way.)

    On an accelerator x and the parameters are rounded first, as Composer does: the kernels there
    read all three in one dtype, and move fewer bytes in this one. An x that they would round twice,
    lose too much of, or refuse is normalised in float32: bfloat16 under an autocast to float16, the
    reverse, float8.

    Compiled code rounds a float32 x first, on every device: AOTAutograd keeps the rounded x for
    backward, half the bytes of x itself, and Inductor fuses the casts into the norm's kernels. What
    is exported keeps nothing, and rounds nothing early. An autograd function that keeps a rounded
    xhat would be as small and more accurate, but torch 2.13 does not store its graph in
    AOTAutograd's cache. Nor one with an autocast region; and `torch._C._DisableAutocast` is in no
    graph: what is exported would be promoted when it runs.

    Args:
        operator: The norm, as `operator(x, what, weight, bias, eps)`.
        x: As for a `Backend`, and so are weight, bias, eps and dtype.
        what: The second argument of the norm: normalized_shape, or num_groups.

    Source:
        MosaicML Composer, Low Precision LayerNorm and GroupNorm; differs in: on CPU nothing is
        rounded first.
    """
    f32 = torch.float32
    if is_compiling():
        if x.dtype is f32 and GRAPHS_KEEP_ROUNDED_INPUTS and not is_exporting():
            x = x.to(dtype=dtype)
    elif x.is_cpu:
        if x.dtype is f32 and (weight is None or weight.dtype is f32):
            return operator(x, what, weight, bias, eps).to(dtype=dtype)
    elif (
        (x.dtype is dtype or x.dtype is f32)
        and (CUDA_NORMALISES_BFLOAT16 or dtype is torch.float16)
        and can_be_saved(x)
    ):
        # Outside of autocast, which would force float32.
        with autocast_disabled():
            return operator(x.to(dtype=dtype), what, _cast(weight, dtype), _cast(bias, dtype), eps)
    return lower_in_float32(operator, x, what, weight, bias, eps, dtype)


def lower_in_float32(
    operator: Operator,
    x: Tensor,
    what: object,
    weight: Affine,
    bias: Affine,
    eps: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Run `operator` in float32, and round nothing but its output."""
    f32 = torch.float32
    return operator(x.float(), what, _cast(weight, f32), _cast(bias, f32), eps).to(dtype=dtype)


def _cast(parameter: Affine, dtype: torch.dtype) -> Affine:
    if parameter is None or (parameter.dtype not in DTYPES and is_left_alone(parameter)):
        return parameter
    return parameter.to(dtype=dtype)


def is_left_alone(tensor: Tensor) -> bool:
    """Return True if stock casts no `tensor` of this dtype, none of `DTYPES`, for a norm.

    Such a tensor gets PyTorch's own error, as in stock. Autocast casts no float64, no integer and
    no complex tensor. For a norm on CPU it casts nothing, and the kernels there refuse float8.
    """
    return tensor.is_cpu or tensor.dtype is torch.float64 or not tensor.is_floating_point()


_function: Callable[..., object]
for _function in (normalise, rms_norm, _rms_norm, lower, lower_in_float32, _cast, is_left_alone):
    never_a_frame_of_its_own(_function)
