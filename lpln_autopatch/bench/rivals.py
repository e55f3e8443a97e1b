"""What lowered LayerNorm is measured against, and what has to hold before it is."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from lpln_autopatch import status
from lpln_autopatch.torch_compat import autocast_dtype


class ComposerRecipe(torch.nn.LayerNorm):
    """Composer's low-precision LayerNorm: cast x, weight and bias, then normalise.

    Source:
        MosaicML Composer, `LPLayerNorm`; differs in: autocast is asked about the device of x,
        so that it has an effect on CPU too.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device_type = input.device.type
        dtype = autocast_dtype(device_type)
        x = input if dtype is None else input.to(dtype=dtype)
        weight = _cast(self.weight, dtype)
        bias = _cast(self.bias, dtype)
        with torch.autocast(enabled=False, device_type=device_type):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def _cast(parameter: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    return parameter if parameter is None or dtype is None else parameter.to(dtype=dtype)


def refuse_to_run(device: str) -> None:
    """Exit with one line if `device` cannot be used, or LayerNorm is patched already."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {device} cannot be used here: {str(error).splitlines()[0]}")
    if status().installed:
        sys.exit("LPLN_PRECISION is set: unset it, the benchmark turns low precision on itself.")
