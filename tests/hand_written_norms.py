"""Norms that classes write out, as public models have them, and classes that are nearly norms."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpln_autopatch import low_precision_layernorm, report
from lpln_autopatch._torch_compat import HAS_RMS_NORM

needs_hand_written = pytest.mark.skipif(
    not HAS_RMS_NORM, reason="hand-written norms are lowered from torch 2.4 on; CI runs later ones"
)
autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
by_hand = functools.partial(low_precision_layernorm, norms="hand_written")


def run(module, x, **options):
    with autocast(**options):
        return module(x)


def report_of(module, x):
    with autocast():
        return report(module, x)


class Norm(nn.Module):
    """A module with a weight and eps, and a bias if it is asked for."""

    def __init__(self, size=8, eps=1e-6, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.bias = nn.Parameter(torch.randn(size)) if bias else None
        self.eps = eps


class LlamaRMSNorm(Norm):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return self.weight * hidden_states.to(input_dtype)


class GemmaRMSNorm(Norm):
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        return (output * (1.0 + self.weight.float())).type_as(x)


class GatedRMSNorm(Norm):
    def forward(self, hidden_states, gate=None):
        x = hidden_states.float()
        if gate is not None:
            x = x * F.silu(gate.float())
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class PlainRMSNorm(nn.Module):
    def forward(self, x):
        return x / torch.sqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)


class RMSNormWithBias(Norm):
    def __init__(self, size=8):
        super().__init__(size, bias=True)

    def forward(self, x):
        x = x.float()
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


class HeadsRMSNorm(nn.Module):
    """RMSNorm with a g for each head: F.normalize(x) * sqrt(n) * g."""

    def __init__(self, size=8, heads=3):
        super().__init__()
        self.scale = size**0.5
        self.gamma = nn.Parameter(torch.randn(heads, 1, size))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.gamma * self.scale


class ScaleNorm(nn.Module):
    """ScaleNorm of x-transformers: one number scales all features."""

    def __init__(self, size=8):
        super().__init__()
        self.scale = size**0.5
        self.g = nn.Parameter(torch.randn(1))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * self.g


class BiaslessLayerNorm(Norm):
    def forward(self, x):
        x = x.float()
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight


class CastingLayerNorm(nn.LayerNorm):
    """LayerNorm of open_clip, which casts back to the input's dtype."""

    def forward(self, x):
        x_dtype = x.dtype
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.to(x_dtype)


class SuperLayerNorm(nn.LayerNorm):
    """LayerNorm of Chameleon and OLMo, by super().forward."""

    def forward(self, hidden_states):
        return super().forward(hidden_states).to(hidden_states.dtype)


class LayerNorm2d(Norm):
    """LayerNorm of ConvNeXt and SAM, over the channels of an image."""

    def __init__(self, size=8):
        super().__init__(size, bias=True)

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class PermutingLayerNorm2d(nn.LayerNorm):
    """LayerNorm2d of timm."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class VideoRMSNorm(nn.Module):
    """RMSNorm of Wan, with a weight of (n, 1, 1, 1)."""

    def __init__(self, size=8):
        super().__init__()
        self.scale = size**0.5
        self.gamma = nn.Parameter(torch.randn(size, 1, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.scale * self.gamma


ROWS = (2, 3, 8)
NORMS = {
    LlamaRMSNorm: ROWS,
    GemmaRMSNorm: ROWS,
    GatedRMSNorm: ROWS,
    PlainRMSNorm: ROWS,
    RMSNormWithBias: ROWS,
    HeadsRMSNorm: (2, 3, 5, 8),
    ScaleNorm: ROWS,
    BiaslessLayerNorm: ROWS,
    lambda: CastingLayerNorm(8): ROWS,
    lambda: SuperLayerNorm(8): ROWS,
    LayerNorm2d: (2, 8, 3, 4),
    lambda: PermutingLayerNorm2d(8): (2, 8, 3, 4),
    VideoRMSNorm: (2, 8, 2, 3, 4),
}
"""What makes each norm, and the shape of an input."""


class UnbiasedNorm(Norm):
    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)


class EpsOutsideNorm(Norm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class WeightFirstNorm(Norm):
    def forward(self, x):
        x = x * self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class ClampedNorm(Norm):
    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return y.clamp(-1000, 1000)


class ClampedVarianceNorm(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=1e-7)) * self.weight


class DroppingNorm(Norm):
    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return F.dropout(y, 0.1, self.training)


class TrainingNorm(Norm):
    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return y if self.training else 1.01 * y


class DetachedNorm(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class HidingNorm(Norm):
    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return torch.nan_to_num(y) * self.weight


class FactorNorm(Norm):
    def forward(self, x):
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class OtherDimNorm(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + self.eps) * self.weight


class OneSizeNorm(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + self.eps) * self.weight


class RunningNorm(Norm):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class CountingNorm(Norm):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class LoggingNorm(Norm):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        self.log.append(x.shape)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class HoldingNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = UnbiasedNorm()

    def forward(self, x):
        return self.norm(x)


class SumNorm(Norm):
    def forward(self, x, other):
        x = x + other
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def norm(x, eps=1e-6):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


class SequenceNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8))

    def forward(self, x):
        return norm(super().forward(x))


class DictNorm(Norm):
    def forward(self, x):
        return norm(x) * self._parameters["weight"]


class DataNorm(Norm):
    def forward(self, x):
        self.weight.data.clamp_(-0.5, 0.5)
        return norm(x) * self.weight


class ClassNorm(Norm):
    def forward(self, x):
        return norm(x) * self.weight if type(self) is ClassNorm else norm(x)


class OutlierNorm(Norm):
    def __init__(self):
        super().__init__(256)

    def forward(self, x):
        return norm(x).clamp(-5, 5) * self.weight


class PlainOutlierNorm(nn.Module):
    def forward(self, x):
        return norm(x).clamp(-10, 10)


class GradientNorm(Norm):
    def forward(self, x):
        return norm(x) * self.weight * (1 if torch.is_grad_enabled() else 2)


class LowNorm(Norm):
    def forward(self, x):
        y = norm(x) * self.weight
        return y if x.dtype is torch.float32 else y * 2


class ModeNorm(Norm):
    def forward(self, x):
        return norm(x, 1e-3 if self.training else 1e-6) * self.weight


class MissingNorm(Norm):
    def forward(self, x):
        return norm(x) * self.weight * (2 if not hasattr(self, "scale") else 1)


class RowsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2000, 8))

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Rms(Norm):
    """RMSNorm in a class whose name is not that of a norm."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


NEAR_MISSES = [
    UnbiasedNorm,
    EpsOutsideNorm,
    WeightFirstNorm,
    ClampedNorm,
    ClampedVarianceNorm,
    DroppingNorm,
    TrainingNorm,
    DetachedNorm,
    HidingNorm,
    FactorNorm,
    OtherDimNorm,
    OneSizeNorm,
    RunningNorm,
    CountingNorm,
    LoggingNorm,
    HoldingNorm,
    SequenceNorm,
    DictNorm,
    DataNorm,
    ClassNorm,
    OutlierNorm,
    PlainOutlierNorm,
    GradientNorm,
    LowNorm,
    ModeNorm,
    MissingNorm,
    RowsNorm,
    Rms,
]
