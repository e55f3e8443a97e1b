"""Norms for comparison: Composer's, and the arithmetic of our backends on a GPU, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpln_autopatch._torch_compat import autocast_dtype
from lpln_autopatch.backends import gradients
from lpln_autopatch.backends.fused.recovery import WORST_RATIO


class ComposerRecipe(torch.nn.LayerNorm):
    """Composer's LayerNorm: cast x, weight and bias, then normalise.

    Source:
        MosaicML Composer, `LPLayerNorm`; differs in: autocast is asked about the device of x,
        so that it has an effect on CPU too.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = _cast(input, self.weight, self.bias)
        with torch.autocast(enabled=False, device_type=input.device.type):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class ComposerGroupNorm(torch.nn.GroupNorm):
    """Composer's GroupNorm.

    Source:
        MosaicML Composer, `LPGroupNorm`; differs as `ComposerRecipe` does.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = _cast(input, self.weight, self.bias)
        with torch.autocast(enabled=False, device_type=input.device.type):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class AcceleratorRecipe(torch.nn.LayerNorm):
    """The arithmetic of `native` and of Composer on an accelerator: it rounds all operands first.

    For a low-precision x the CPU's own kernel sums the parameters' gradients in low precision.
    CUDA's kernel, as this class, sums them in float32 and rounds once.
    """

    def forward(self, input: Tensor) -> Tensor:
        dtype = autocast_dtype(input.device.type)
        if dtype is None:
            return super().forward(input)
        rounded = _cast(input, self.weight, self.bias)
        x, *parameters = [None if t is None else t.float() for t in rounded]
        with torch.autocast(input.device.type, enabled=False):
            y = torch.layer_norm(x, self.normalized_shape, *parameters, self.eps)  # type: ignore[call-arg,arg-type]
        return y.to(dtype)


class AcceleratorRMSNorm(torch.nn.Module):
    """The arithmetic of `native` on an accelerator, for RMSNorms with the attributes of Llama's."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        rounded = _cast(hidden_states, None, None)[0]
        weight = self.weight.to(rounded.dtype).float()
        size = (rounded.shape[-1],)
        with torch.autocast(hidden_states.device.type, enabled=False):
            y = torch.rms_norm(rounded.float(), size, weight, self.variance_epsilon)
        return y.to(rounded.dtype)


class _RoundedXhat(torch.autograd.Function):
    """The arithmetic of the kernels of `fused` and `lean`, in PyTorch's operators, for a float32 x.

    `lean` recovers xhat from y if |bias| is not too large beside |weight|.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor,
        bias: Tensor,
        eps: float,
        lean: bool,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            y, mean, rstd = torch.native_layer_norm(x.float(), shape, weight, bias, eps)
        y, xhat = y.to(dtype), ((x.float() - mean) * rstd).to(dtype)
        if lean:
            recoverable = bias.abs() <= WORST_RATIO * weight.abs()
            xhat = torch.where(recoverable, (y.float() - bias) / weight, xhat.float())
        ctx.save_for_backward(xhat, weight, rstd)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xhat, weight, rstd = ctx.saved_tensors
        x, mean = xhat.float() / rstd, torch.zeros_like(rstd)  # x minus its mean
        wanted = (True, True, True)
        dx, *others = gradients.backward(dy, x, ctx.shape, weight, mean, rstd, wanted)
        return dx, None, *others, None, None


class FusedArithmetic(torch.nn.LayerNorm):
    """The arithmetic of `fused` on a GPU: it rounds the output, and the xhat that it keeps."""

    lean = False

    def forward(self, input: Tensor) -> Tensor:
        if autocast_dtype(input.device.type) is None:
            return super().forward(input)
        arguments = (input, self.normalized_shape, self.weight, self.bias, self.eps, self.lean)
        y: Tensor = _RoundedXhat.apply(*arguments)  # type: ignore[no-untyped-call]
        return y


class LeanArithmetic(FusedArithmetic):
    """The arithmetic of `lean` on a GPU: xhat comes from the rounded output."""

    lean = True


def _cast(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return `x` and `parameters` in the autocast dtype, or as they are without autocast."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = x.to(dtype=dtype)
        parameters = tuple(p if p is None else p.to(dtype=dtype) for p in parameters)
    weight, bias = parameters
    return x, weight, bias
