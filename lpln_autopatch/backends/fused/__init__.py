"""One Triton kernel forward, and one pass over x and dy backward.

x is read once in its own dtype, y is written once in the autocast dtype; nothing is cast outside
of the kernels. A low-precision x itself is what is saved for backward, with two float32 for each
row; for a float32 x that is xhat = (x - mean) / std in the autocast dtype, half the bytes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lpln_autopatch.backends import cpu, native
from lpln_autopatch.backends.stand_in import in_place_of, stand_in_for
from lpln_autopatch.torch_compat import (
    TORCH_VERSION,
    forward_mode_is_on,
    never_a_frame_of_its_own,
    something_intercepts_operators,
)

if TYPE_CHECKING:
    from lpln_autopatch.backends.protocol import Backend

MAX_FEATURES = 65536
"""The longest row that the kernels take, in elements."""

_X_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def load() -> Backend:
    """`normalise`, if Triton is here.

    Raises:
        ImportError: it is not, or this torch is too old, or for ROCm. What to do.
    """
    if TORCH_VERSION < (2, 6):
        raise ImportError(
            f"it needs torch 2.6 or later, this is {torch.__version__}. "
            "Update it, or name another backend."
        )
    if torch.version.hip is not None:
        raise ImportError("it is not for ROCm. Name another backend.")
    try:
        _launch()
    except ImportError as error:
        raise ImportError(
            f"Triton cannot be imported ({error}). It comes with the CUDA builds "
            "of torch; elsewhere: pip install triton"
        ) from error
    return normalise


@functools.cache
def _launch() -> Any:
    # Not at the top: Triton is optional, and takes a while to import.
    return importlib.import_module("lpln_autopatch.backends.fused.launch")


def normalise(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise `x` in one kernel where it can, natively elsewhere: `_takes` has the rule.

    Nothing but the output is rounded: it is the float32 result, rounded once. The gradients of a
    float32 x and of weight are computed from xhat rounded to `dtype`. Arguments and result are
    those of `lpln_autopatch.backends.Backend`.
    """
    shape = tuple(normalized_shape)
    if not _takes(x, shape, weight, bias):
        return native.normalise(x, normalized_shape, weight, bias, eps, dtype)
    y: torch.Tensor
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        keeps_xhat = x.dtype is torch.float32 and dtype is not torch.float32
        stand_in = stand_in_for(x) if keeps_xhat else None
        arguments = (x, stand_in, keeps_xhat, len(shape), weight, bias, eps, dtype)
        y = _FusedLayerNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y = _launch().forward(x, len(shape), weight, bias, eps, dtype, None, None)
    return y


def _takes(
    x: torch.Tensor,
    shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> bool:
    return (
        (x.is_cuda or (x.is_cpu and _launch().INTERPRETED))
        and x.dtype in _X_DTYPES
        # The kernels have no formula for functorch's transforms and for forward mode, and a
        # TorchDispatchMode (FakeTensorMode, ...) would not see them.
        and not something_intercepts_operators()
        and not forward_mode_is_on()
        and _is_plain(x)
        # Autograd cannot save it; a copy in float32, as stock makes of low precision, it can.
        and not (x.is_inference() and torch.is_grad_enabled())
        # Another shape, or none, gets PyTorch's own error.
        and x.shape[-len(shape) :] == shape
        and len(shape) > 0
        and x.numel() > 0
        and x.shape[-len(shape) :].numel() <= MAX_FEATURES
        and _takes_parameter(weight, x, shape)
        and _takes_parameter(bias, x, shape)
    )


def _takes_parameter(
    parameter: torch.Tensor | None, x: torch.Tensor, shape: tuple[int, ...]
) -> bool:
    return parameter is None or (
        parameter.dtype in _X_DTYPES
        and type(parameter) in _PLAIN
        and not parameter.is_neg()
        and parameter.shape == shape
        and parameter.device == x.device
        and parameter.is_contiguous()
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is what lies in its memory: no subclass, negative view, zero, batch, ..."""
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return type(tensor) in _PLAIN and keys in _plain_keys(tensor.is_cuda)


@functools.cache
def _plain_keys(is_cuda: bool) -> frozenset[int]:
    device = "cuda" if is_cuda else "cpu"
    normal = torch.empty(0, device=device)
    with torch.inference_mode():
        inference = torch.empty(0, device=device)
    return frozenset(torch._C._dispatch_keys(tensor).raw_repr() for tensor in (normal, inference))


class _FusedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stand_in: torch.Tensor | None,
        keeps_xhat: bool,
        n_dims: int,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        statistics = x.new_empty((2, x.shape[:-n_dims].numel()), dtype=torch.float32)
        xhat = None
        if keeps_xhat:
            xhat = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        y: torch.Tensor = _launch().forward(x, n_dims, weight, bias, eps, dtype, statistics, xhat)
        ctx.save_for_backward(x if xhat is None else xhat, weight, bias, statistics)
        ctx.n_dims, ctx.is_xhat, ctx.stand_in = n_dims, keeps_xhat, stand_in
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
        arguments = (dy, x, ctx.n_dims, weight, bias, statistics, wanted, ctx.is_xhat)
        # With create_graph, what comes out is differentiated again.
        differentiated = torch.is_grad_enabled() or forward_mode_is_on()
        # What hooks on saved tensors give back may be anything of the right shape.
        if (
            differentiated
            or something_intercepts_operators()
            or not all(t is None or _is_plain(t) for t in (dy, x, weight, statistics))
            or not (weight is None or weight.is_contiguous())
            or not statistics.is_contiguous()
        ):
            dx, dweight, dbias = _backward_natively(*arguments, ctx.stand_in)
        else:
            dx, dweight, dbias = _launch().backward(*arguments)
        return dx, None, None, None, dweight, dbias, None, None


def _backward_natively(
    dy: torch.Tensor,
    x: torch.Tensor,
    n_dims: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    wanted: Sequence[bool],
    is_xhat: bool,
    stand_in: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """`launch.backward` in operators of PyTorch's, which know their own derivatives."""
    mean, rstd = statistics.view(2, *x.shape[:-n_dims], *[1] * n_dims)
    if is_xhat:  # x, but for its mean, on which no derivative depends
        x, mean = in_place_of(stand_in, x / rstd), torch.zeros_like(mean)
    return cpu.backward(dy, x, x.shape[-n_dims:], weight, bias, mean, rstd, wanted)


# Dynamo is not to look for graphs in any of this: code that it compiles takes another way.
never_a_frame_of_its_own(normalise, nor_what_it_calls=True)
never_a_frame_of_its_own(_FusedLayerNorm.backward, nor_what_it_calls=True)
