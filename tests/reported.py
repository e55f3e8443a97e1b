"""Models to report on, and their reports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support import autocast

from lpln_autopatch import low_precision_layernorm, report


class CallsTheFunction(torch.nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ByHand(torch.nn.Module):
    """A norm of its own, which calls none of PyTorch's."""

    def forward(self, x):
        return x / x.float().abs().mean(-1, keepdim=True)


class ByHandNorm(ByHand):
    pass


class Raises(torch.nn.Module):
    def forward(self, x):
        raise ArithmeticError


def lowered_report(model, x=None, **options):
    """Return the report under bf16 autocast on the CPU."""
    with low_precision_layernorm(**options), autocast():
        return report(model, torch.randn(4, 8) if x is None else x)
