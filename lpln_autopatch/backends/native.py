"""PyTorch's own kernels.

Casts are spelled `.to(dtype=dtype)`: `.to(dtype)`, which torch first tries to read as a device,
makes the whole call 6 % slower (torch 2.13, 8x64 on CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lpln_autopatch.backends import cpu
from lpln_autopatch.torch_compat import (
    CUDA_NORMALISES_BFLOAT16,
    GRAPHS_KEEP_ROUNDED_INPUTS,
    autocast_disabled,
    is_compiling,
    never_a_frame_of_its_own,
)

Operator = Callable[..., torch.Tensor]
"""A norm as PyTorch has it: of x, its second argument, weight, bias and eps."""


def normalise(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise `x` over its trailing dimensions in the autocast dtype: the native backend.

    Arguments and result are those of `lpln_autopatch.backends.Backend`; `lower` says how.
    """
    if cpu.takes(x, weight, bias, dtype):
        return cpu.normalise(x, normalized_shape, weight, bias, eps, dtype)
    # The operator, not torch.nn.functional.layer_norm, which is wrapped.
    return lower(torch.layer_norm, x, normalized_shape, weight, bias, eps, dtype)


def lower(
    operator: Operator,
    x: torch.Tensor,
    what: object,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Run the norm `operator` in the autocast dtype.

    On CPU nothing is rounded before the output: closer than Composer's recipe, and faster, with
    no cast but the output's, and the caller's own float32 x saved for backward. A low-precision x
    is upcast: PyTorch's kernels for one sum the gradients of weight and bias in x's dtype. (A
    large one of a LayerNorm never gets here: `cpu` has a better way.)

    On an accelerator x and the parameters are rounded first, as Composer does: the kernels
    there read all three in one dtype, and move fewer bytes in this one.

    What is compiled or exported takes `_lower_in_a_graph`, on every device.

    Args:
        operator: The norm, as `operator(x, what, weight, bias, eps)`.
        x: Input, any floating dtype but float64.
        what: The second argument of the norm: normalized_shape, or num_groups.
        weight: Scale, or None.
        bias: Shift, or None.
        eps: Added to the variance.
        dtype: The autocast dtype of x's device, float16 or bfloat16.

    Returns:
        Tensor of the shape of `x`, in `dtype`. Statistics are computed in float32.

    Source:
        MosaicML Composer, Low Precision LayerNorm and GroupNorm; differs in: on CPU nothing is
        rounded first.
    """
    if is_compiling():
        return _lower_in_a_graph(operator, x, what, weight, bias, eps, dtype)
    if x.is_cpu:
        if x.dtype is torch.float32 and (weight is None or weight.dtype is torch.float32):
            return operator(x, what, weight, bias, eps).to(dtype=dtype)
    elif (
        (x.dtype is dtype or x.dtype is torch.float32)
        and (CUDA_NORMALISES_BFLOAT16 or dtype is torch.float16)
        # Autograd cannot save it; a copy in float32, as stock makes of it, it can.
        and not (x.is_inference() and torch.is_grad_enabled())
    ):
        return _lower_in_low_precision(operator, x, what, weight, bias, eps, dtype)
    return _lower_in_float32(operator, x, what, weight, bias, eps, dtype)


def _lower_in_low_precision(
    operator: Operator,
    x: torch.Tensor,
    what: object,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Round x, weight and bias to `dtype`, then normalise: Composer's recipe.

    Outside of autocast, which would force float32. Arguments and result are those of `lower`.
    """
    with autocast_disabled():
        return operator(x.to(dtype=dtype), what, _cast(weight, dtype), _cast(bias, dtype), eps)


def _lower_in_a_graph(
    operator: Operator,
    x: torch.Tensor,
    what: object,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise in float32, and in compiled code round a float32 x to `dtype` first.

    What AOTAutograd keeps for backward is then the rounded x, half the bytes of x itself, and
    Inductor fuses the casts into the norm's kernels. What is exported keeps nothing, and rounds
    nothing early.

    An autograd function that keeps a rounded xhat would be as small and more accurate, but torch
    2.13 does not store its graph in AOTAutograd's cache. Nor one with an autocast region; and
    `torch._C._DisableAutocast` is in no graph: what is exported would be promoted when it runs.

    Arguments and result are those of `lower`.
    """
    if (
        x.dtype is torch.float32
        and GRAPHS_KEEP_ROUNDED_INPUTS
        and not torch.compiler.is_exporting()
    ):
        x = x.to(dtype=dtype)
    return _lower_in_float32(operator, x, what, weight, bias, eps, dtype)


def _lower_in_float32(
    operator: Operator,
    x: torch.Tensor,
    what: object,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise in float32 and round once, whatever comes in.

    For the inputs that PyTorch's kernels would round twice, lose too much of, or not take:
    bfloat16 under an autocast to float16, the reverse, float8, low precision on CPU; and for
    compiled code. Arguments and result are those of `lower`.
    """
    f32 = torch.float32
    return operator(x.float(), what, _cast(weight, f32), _cast(bias, f32), eps).to(dtype=dtype)


def _cast(parameter: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    # Autocast does not touch float64 either: such a parameter gets PyTorch's own error.
    if parameter is None or parameter.dtype is torch.float64:
        return parameter
    return parameter.to(dtype=dtype)


for _function in (
    normalise,
    lower,
    _lower_in_low_precision,
    _lower_in_a_graph,
    _lower_in_float32,
    _cast,
):
    never_a_frame_of_its_own(_function)
