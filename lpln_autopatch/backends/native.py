"""PyTorch's own kernels.

Casts are spelled `.to(dtype=dtype)`: `.to(dtype)`, which torch first tries to read as a device,
makes the whole call 6 % slower (torch 2.13, 8x64 on CPU).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lpln_autopatch.torch_compat import (
    CUDA_NORMALISES_BFLOAT16,
    autocast_disabled,
    never_a_frame_of_its_own,
)


def normalise(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise `x` over its trailing dimensions in the autocast dtype.

    On CPU nothing is rounded before the output: closer than Composer's recipe, and faster, with
    no cast but the output's, and the caller's own float32 x saved for backward. A low-precision x
    is upcast, though there is a kernel for it: that one sums the gradients of weight and bias in
    x's dtype, 7 % off at 4096 rows of bfloat16, 26 % at 65536 (torch 2.13 and 2.15; in float32,
    one part in a million). Not only where gradients are wanted: no_grad must not change values.

    On an accelerator x and the parameters are rounded first, as Composer does: the kernels
    there read all three in one dtype, and move fewer bytes in this one.

    Arguments and result are those of `lpln_autopatch.backends.Backend`.

    Source:
        MosaicML Composer, Low Precision LayerNorm; differs in: on CPU nothing is rounded first.
    """
    if x.is_cpu:
        if x.dtype is torch.float32 and (weight is None or weight.dtype is torch.float32):
            return F.layer_norm(x, normalized_shape, weight, bias, eps).to(dtype=dtype)
    elif (
        (x.dtype is dtype or x.dtype is torch.float32)
        and (CUDA_NORMALISES_BFLOAT16 or dtype is torch.float16)
        # Autograd cannot save it; a copy in float32, as stock makes of it, it can.
        and not (x.is_inference() and torch.is_grad_enabled())
    ):
        return normalise_in_low_precision(x, normalized_shape, weight, bias, eps, dtype)
    return normalise_in_float32(x, normalized_shape, weight, bias, eps, dtype)


def normalise_in_low_precision(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Round x, weight and bias to `dtype`, then normalise: Composer's recipe.

    Outside of autocast, which would force float32. Arguments and result are those of `normalise`.
    """
    with autocast_disabled():
        return F.layer_norm(
            x.to(dtype=dtype), normalized_shape, _cast(weight, dtype), _cast(bias, dtype), eps
        )


def normalise_in_float32(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise in float32 and round once, whatever comes in.

    For the inputs that PyTorch's kernels would round twice, lose too much of, or not take:
    bfloat16 under an autocast to float16, the reverse, float8, low precision on CPU. Arguments
    and result are those of `normalise`.
    """
    return F.layer_norm(
        x.float(),
        normalized_shape,
        _cast(weight, torch.float32),
        _cast(bias, torch.float32),
        eps,
    ).to(dtype=dtype)


def _cast(parameter: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    # Autocast does not touch float64 either: such a parameter gets PyTorch's own error.
    if parameter is None or parameter.dtype is torch.float64:
        return parameter
    return parameter.to(dtype=dtype)


for _function in (normalise, normalise_in_low_precision, normalise_in_float32, _cast):
    never_a_frame_of_its_own(_function)
