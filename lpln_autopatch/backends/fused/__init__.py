"""LayerNorm and RMSNorm in Triton kernels: the backends "fused" and "lean".

x is read once in its own dtype, y is written once in the autocast dtype, and nothing is cast
outside of the kernels. The two keep different tensors for backward, which `function.py` names.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from lpln_autopatch._torch_compat import (
    HAS_TRITON_KERNELS,
    never_a_frame_of_its_own,
    something_intercepts_operators,
)
from lpln_autopatch.backends import gradients, native
from lpln_autopatch.backends.fused.function import FusedNorm, is_what_lies_in_memory, launcher
from lpln_autopatch.backends.protocol import Affine, Backend, Shape

MAX_FEATURES = 65536
"""The longest row that the kernels take, in elements."""

_logger = logging.getLogger("lpln_autopatch")


class Fused:
    """A `Backend` that normalises in the kernels, where these run, and natively elsewhere.

    Nothing but the output is rounded: it is the float32 result, rounded once.
    """

    def __init__(self, name: str, lean: bool) -> None:
        self._name, self._lean = name, lean

    def __repr__(self) -> str:
        return f"<backend {self._name}>"

    def __call__(
        self,
        x: Tensor,
        normalized_shape: Shape,
        weight: Affine,
        bias: Affine,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Normalise `x` as a LayerNorm."""
        if not takes(x, normalized_shape, weight, bias):
            self._say_why(x)
            return native.normalise(x, normalized_shape, weight, bias, eps, dtype)
        return self._run(x, normalized_shape, weight, bias, eps, dtype, True)

    def rms_norm(
        self,
        x: Tensor,
        normalized_shape: Shape,
        weight: Affine,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Normalise `x` as an RMSNorm."""
        if not takes(x, normalized_shape, weight, None):
            self._say_why(x)
            return native.rms_norm(x, normalized_shape, weight, eps, dtype)
        return self._run(x, normalized_shape, weight, None, eps, dtype, False)

    def _run(
        self,
        x: Tensor,
        shape: Shape,
        weight: Affine,
        bias: Affine,
        eps: float,
        dtype: torch.dtype,
        centred: bool,
    ) -> Tensor:
        y: Tensor
        if gradients.wants_gradient(x, weight, bias):
            y = FusedNorm.apply(x, weight, bias, len(shape), eps, dtype, centred, self._lean)  # type: ignore[no-untyped-call]
        else:
            y = launcher().forward(x, len(shape), weight, bias, eps, dtype, centred)
        return y

    def _say_why(self, x: Tensor) -> None:
        if not _runs_on(x):
            where = x.device.type if HAS_TRITON_KERNELS else "torch before 2.6 and on ROCm"
            _say_once(f"backend {self._name!r}: its kernels do not run on {where}: it is native")


@functools.cache
def _say_once(line: str) -> None:
    _logger.info(line)


fused = Fused("fused", lean=False)
lean = Fused("lean", lean=True)


def load(backend: Backend) -> Backend:
    """Return `backend`.

    Raises:
        ImportError: the kernels could run here, but Triton cannot be imported.
    """
    if HAS_TRITON_KERNELS:
        try:
            launcher()
        except ImportError as error:
            raise ImportError(
                f"Triton cannot be imported ({error}). It comes with the CUDA builds "
                "of torch; elsewhere: pip install triton"
            ) from error
    return backend


def why_native() -> str:
    """Return why the kernels cannot run in this process, or "" if they can."""
    if not HAS_TRITON_KERNELS:
        return "native: the kernels need torch 2.6 or later, and not ROCm"
    if not (launcher().takes_cpu() or torch.cuda.is_available()):
        return "native: there is no CUDA device, and on a CPU every call goes to native"
    return ""


def _runs_on(x: Tensor) -> bool:
    return HAS_TRITON_KERNELS and (x.is_cuda or (x.is_cpu and launcher().takes_cpu()))


def takes(x: Tensor, shape: Shape, weight: Affine, bias: Affine) -> bool:
    """Return True if the kernels can take this call."""
    return (
        _runs_on(x)
        # A TorchDispatchMode (FakeTensorMode, ...) would not see the kernels.
        and not something_intercepts_operators()
        and gradients.takes(x, shape, weight, bias)
        and gradients.can_be_saved(x)
        and is_what_lies_in_memory(x)
        and x.shape[-len(shape) :].numel() <= MAX_FEATURES
        and (weight is None or (weight.is_contiguous() and not weight.is_neg()))
        and (bias is None or (bias.is_contiguous() and not bias.is_neg()))
    )


# Dynamo must not look for graphs in these functions: code that it compiles is native's.
for _function in (Fused.__call__, Fused.rms_norm):
    never_a_frame_of_its_own(_function, nor_what_it_calls=True)
