"""LayerNorm and RMSNorm in Triton kernels: the backends "fused" and "lean".

x is read once in its own dtype, y is written once in the autocast dtype, and nothing is cast
outside of the kernels. The two keep different tensors for backward, which `function.py` names.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpln_autopatch._torch_compat import (
    HAS_TRITON_KERNELS,
    forward_mode_is_on,
    never_a_frame_of_its_own,
    something_intercepts_operators,
)
from lpln_autopatch.backends import gradients, native
from lpln_autopatch.backends.fused.function import is_what_lies_in_memory, normalise
from lpln_autopatch.backends.protocol import Affine, Backend, Shape

if TYPE_CHECKING:
    from lpln_autopatch.backends.fused.plan import Plan

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
        plan = self._plan(x, normalized_shape, weight, bias, eps, dtype, True)
        if plan is None:
            return native.normalise(x, normalized_shape, weight, bias, eps, dtype)
        return normalise(plan, x, weight, bias)

    def rms_norm(
        self,
        x: Tensor,
        normalized_shape: Shape,
        weight: Affine,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Normalise `x` as an RMSNorm."""
        plan = self._plan(x, normalized_shape, weight, None, eps, dtype, False)
        if plan is None:
            return native.rms_norm(x, normalized_shape, weight, eps, dtype)
        return normalise(plan, x, weight, None)

    def _plan(
        self,
        x: Tensor,
        shape: Shape,
        weight: Affine,
        bias: Affine,
        eps: float,
        dtype: torch.dtype,
        centred: bool,
    ) -> Plan | None:
        """Return the plan of a call that the kernels can take."""
        if not _runs_on(x):
            self._say_why(x)
            return None
        if not (
            is_what_lies_in_memory(x)
            and not something_intercepts_operators()
            and not forward_mode_is_on()
            and gradients.can_be_saved(x)
            and isinstance(shape, (tuple, list))
        ):
            return None
        key = (
            x.shape, x.stride(), x.dtype, x.get_device(), tuple(shape), _kind(weight), _kind(bias),
            eps, dtype, centred, self._lean,
        )  # fmt: skip
        try:
            return _plans[key]
        except KeyError:
            plan = None
        except TypeError:  # a shape that is none: PyTorch's own error
            return None
        if _take(x, shape, weight, bias):
            arguments = x, len(shape), weight, bias, eps, dtype, centred, self._lean
            plan = _triton().Plan(*arguments)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
        return plan

    def _say_why(self, x: Tensor) -> None:
        where = x.device.type if HAS_TRITON_KERNELS else "torch before 2.6 and on ROCm"
        _say_once(f"backend {self._name!r}: its kernels do not run on {where}: it is native")


# For each kind of call; None, where the kernels cannot take it.
_plans: dict[tuple[object, ...], Plan | None] = {}
_MOST_PLANS = 4096  # sizes and strides may be new ones in each step


def _kind(parameter: Affine) -> object:
    """Return what a plan and `_take` know of a parameter."""
    if parameter is None:
        return None
    p = parameter
    return is_what_lies_in_memory(p), p.dtype, p.shape, p.device, p.is_contiguous()


@functools.cache
def _say_once(line: str) -> None:
    _logger.info(line)


fused = Fused("fused", lean=False)
lean = Fused("lean", lean=True)


@functools.cache
def _triton() -> Any:
    """Import the module that knows Triton, which is optional, and takes a while to import."""
    return importlib.import_module("lpln_autopatch.backends.fused.plan")


def load(backend: Backend) -> Backend:
    """Return `backend`.

    Raises:
        ImportError: the kernels could run here, but Triton cannot be imported.
    """
    if HAS_TRITON_KERNELS:
        try:
            _triton()
        except ImportError as error:
            raise ImportError(
                f"Triton cannot be imported ({error}). It comes with the CUDA builds "
                "of torch; elsewhere: pip install triton, and numpy for its interpreter"
            ) from error
    return backend


def why_native() -> str:
    """Return why the kernels cannot run in this process, or "" if they can."""
    if not HAS_TRITON_KERNELS:
        return "native: the kernels need torch 2.6 or later, and not ROCm"
    if not (_triton().takes_cpu() or torch.cuda.is_available()):
        return "native: there is no CUDA device, and on a CPU every call goes to native"
    return ""


def _runs_on(x: Tensor) -> bool:
    return HAS_TRITON_KERNELS and (x.is_cuda or (x.is_cpu and _triton().takes_cpu()))


def _take(x: Tensor, shape: Shape, weight: Affine, bias: Affine) -> bool:
    """Return True if the kernels can take calls with tensors such as these."""
    return (
        gradients.takes(x, shape, weight, bias)
        and x.shape[-len(shape) :].numel() <= MAX_FEATURES
        and (weight is None or (weight.is_contiguous() and is_what_lies_in_memory(weight)))
        and (bias is None or (bias.is_contiguous() and is_what_lies_in_memory(bias)))
    )


# Dynamo must not look for graphs in these functions: code that it compiles is native's.
for _function in (Fused.__call__, Fused.rms_norm):
    never_a_frame_of_its_own(_function, nor_what_it_calls=True)
