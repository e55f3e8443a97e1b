"""Composer's low-precision norms, as it has them: the rival that is always here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lpln_autopatch.torch_compat import autocast_dtype


class ComposerRecipe(torch.nn.LayerNorm):
    """Cast x, weight and bias, then normalise.

    Source:
        MosaicML Composer, `LPLayerNorm`; differs in: autocast is asked about the device of x,
        so that it has an effect on CPU too.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = _cast(input, self.weight, self.bias)
        with torch.autocast(enabled=False, device_type=input.device.type):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class ComposerGroupNorm(torch.nn.GroupNorm):
    """The same for GroupNorm.

    Source:
        MosaicML Composer, `LPGroupNorm`; differs as `ComposerRecipe` does.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = _cast(input, self.weight, self.bias)
        with torch.autocast(enabled=False, device_type=input.device.type):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def _cast(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`x` and `parameters` in the autocast dtype, where there is one."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = x.to(dtype=dtype)
        parameters = tuple(p if p is None else p.to(dtype=dtype) for p in parameters)
    weight, bias = parameters
    return x, weight, bias
