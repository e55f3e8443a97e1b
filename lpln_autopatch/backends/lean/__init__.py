"""Keeps for backward what the next layer keeps anyway: the output, and 1 / std of each row.

`recovery` says how the gradients stay right without x, and its limits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lpln_autopatch.backends import native
from lpln_autopatch.backends.lean import compiled as compiled
from lpln_autopatch.backends.lean import recovery
from lpln_autopatch.backends.stand_in import in_place_of, stand_in_for
from lpln_autopatch.torch_compat import (
    TORCH_VERSION,
    autocast_disabled,
    forward_mode_is_on,
    never_a_frame_of_its_own,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lpln_autopatch.backends.protocol import Backend

_X_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def load() -> Backend:
    """`normalise`, if this torch is not too old.

    Raises:
        ImportError: it is. What to do.
    """
    if TORCH_VERSION < (2, 1):
        raise ImportError(
            f"it needs torch 2.1 or later, this is {torch.__version__}. "
            "Update it, or name another backend."
        )
    return normalise


def normalise(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise `x` and keep no x for backward where it can, natively elsewhere.

    Nothing but the output is rounded, except that CUDA's kernel takes an x in the autocast dtype
    with weight and bias rounded to it. Arguments and result are those of
    `lpln_autopatch.backends.Backend`.
    """
    shape = tuple(normalized_shape)
    if not _takes(x, shape, weight, bias):
        return native.normalise(x, normalized_shape, weight, bias, eps, dtype)
    tensors = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        arguments = (x, stand_in_for(x), shape, weight, bias, eps, dtype)
        y: torch.Tensor = _LeanLayerNorm.apply(*arguments)  # type: ignore[no-untyped-call]
        return y
    return _normalise(x, shape, weight, bias, eps, dtype).y


def _takes(
    x: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> bool:
    return (
        # An autograd function has no formula for these two.
        not torch._C._are_functorch_transforms_active()
        and not forward_mode_is_on()
        and type(x) in _PLAIN
        and x.dtype in _X_DTYPES
        and x.layout is torch.strided
        and not x.is_nested
        # Another shape, or none, gets PyTorch's own error.
        and x.shape[-len(shape) :] == shape
        and len(shape) > 0
        and x.numel() > 0
        and _takes_parameter(weight, x, shape)
        and _takes_parameter(bias, x, shape)
    )


def _takes_parameter(
    parameter: torch.Tensor | None, x: torch.Tensor, shape: tuple[int, ...]
) -> bool:
    return parameter is None or (
        type(parameter) in _PLAIN
        and parameter.dtype in _X_DTYPES
        and parameter.shape == shape
        and parameter.device == x.device
    )


def _normalise(
    x: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> recovery.Normalised:
    # CUDA's kernel wants one dtype, and gives float32 statistics for it; those of other devices
    # may give them in low precision.
    computed_in = dtype if x.is_cuda and x.dtype is dtype else torch.float32
    with autocast_disabled():
        x = x.to(dtype=computed_in)
        weight, bias = (t if t is None else t.to(dtype=computed_in) for t in (weight, bias))
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        return recovery.Normalised(y.to(dtype=dtype), x, weight, bias, mean, rstd)


class _LeanLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stand_in: torch.Tensor | None,
        shape: tuple[int, ...],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        normalised = _normalise(x, shape, weight, bias, eps, dtype)
        with autocast_disabled():
            kept = recovery.keep(normalised, recovery.countable(weight))
        ctx.save_for_backward(*kept, normalised.rstd, weight)
        ctx.stand_in, ctx.shape = stand_in, shape
        ctx.dtypes = [t if t is None else t.dtype for t in (x, weight, bias)]
        return normalised.y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *kept, rstd, weight = ctx.saved_tensors
        with torch.no_grad():
            x = recovery.recover(*kept).div_(rstd)
        # With create_graph, what comes out is differentiated again.
        x = in_place_of(ctx.stand_in, x)
        # Ones for no weight: with a bias alone PyTorch's own double backward fails (2.13).
        scale = rstd.new_ones(ctx.shape) if weight is None else weight.float()
        gradients = torch.ops.aten.native_layer_norm_backward(
            dy.float(),
            x,
            ctx.shape,
            torch.zeros_like(rstd),
            rstd,
            scale,
            scale,  # for bias, of which it takes the shape
            [ctx.needs_input_grad[i] for i in (0, 3, 4)],
        )
        dx, dweight, dbias = (
            None if gradient is None else gradient.to(dtype=dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return dx, None, None, dweight, dbias, None, None


# Dynamo is not to look for graphs in any of this: code that it compiles takes another way.
never_a_frame_of_its_own(normalise, nor_what_it_calls=True)
never_a_frame_of_its_own(_LeanLayerNorm.backward, nor_what_it_calls=True)
