"""PyTorch's own kernels.

Casts are spelled `.to(dtype=dtype)`: `.to(dtype)`, which torch first tries to read as a device,
makes the whole call 6 % slower (torch 2.13, 8x64 on CPU).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lpln_autopatch.torch_compat import (
    CPU_NORMALISES_LOW_PRECISION,
    CUDA_NORMALISES_BFLOAT16,
    autocast_disabled,
    forward_mode_is_on,
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
    no cast but the output's, and the caller's own float32 x saved for backward.

    On an accelerator x and the parameters are rounded first, as Composer does: the kernels
    there read all three in one dtype, and move fewer bytes in this one.

    Arguments and result are those of `lpln_autopatch.backends.Backend`.

    Source:
        MosaicML Composer, Low Precision LayerNorm; differs in: on CPU nothing is rounded first.
    """
    if x.is_cpu:
        if x.dtype is torch.float32 or (x.dtype is dtype and _cpu_kernel_takes_low_precision()):
            return F.layer_norm(x, normalized_shape, weight, bias, eps).to(dtype=dtype)
    elif (x.dtype is dtype or x.dtype is torch.float32) and (
        CUDA_NORMALISES_BFLOAT16 or dtype is torch.float16
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

    For the inputs that PyTorch's kernels would round twice or not take (bfloat16 under an
    autocast to float16, the reverse, float8), and for those that they lose too much of (see
    `_cpu_kernel_takes_low_precision`). Arguments and result are those of `normalise`.
    """
    return F.layer_norm(
        x.float(),
        normalized_shape,
        _cast(weight, torch.float32),
        _cast(bias, torch.float32),
        eps,
    ).to(dtype=dtype)


def _cpu_kernel_takes_low_precision() -> bool:
    # Its backward sums the gradients of weight and bias in x's dtype: 7 % off at 4096 rows of
    # bfloat16, 26 % at 65536 (torch 2.13 and 2.15; in float32, one part in a million). And from
    # a low-precision x and float32 parameters it makes a float32 tangent.
    return CPU_NORMALISES_LOW_PRECISION and not torch.is_grad_enabled() and not forward_mode_is_on()


def _cast(parameter: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(dtype=dtype)
