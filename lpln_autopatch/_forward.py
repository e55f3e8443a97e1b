"""The hot path: is this call lowered, to which dtype, and by which backend."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from lpln_autopatch import _exemption, _exporting
from lpln_autopatch._precision import NoEffectWarning, Precision
from lpln_autopatch._request import HAND_WRITTEN, Request
from lpln_autopatch._torch_compat import (
    autocast_dtype,
    is_compiling,
    is_dynamo_compiling,
    is_tracing,
    never_a_frame_of_its_own,
    run_while_compiling,
)
from lpln_autopatch.backends import native
from lpln_autopatch.backends.gradients import DTYPES

INTERCEPTED = "__torch_function__"
"""The reason for a call that PyTorch's own function hands to a mode or to the tensor's class."""

NO_AUTOCAST = "no autocast"
"""The reason for a call outside of autocast."""

Decision: TypeAlias = tuple[torch.dtype | None, str]
"""The dtype to which a call is lowered, or None and the reason why it is stock."""


INACTIVE = Request(
    Precision.FP32, "native", "", (torch.float16, torch.bfloat16), native.normalise, ""
)
"""The request that is active while nobody has made one. It lowers nothing."""


# A plain global, because Dynamo guards on one: compiled code follows every change, and keeps
# the lowered and the stock variant side by side. Reading a ContextVar would break the graph.
active: Request = INACTIVE

counter: Callable[[Decision], None] | None = None
"""Counts the decisions, if LPLN_PRECISION is set, for the line at the end of the process."""


def decide_and_count(request: Request, norm: str, x: object, weight: Tensor | None) -> Decision:
    """Decide a call that is made, and have `counter` count it."""
    decision = decide(request, norm, x, weight)
    if counter is not None:
        counter(decision)
    return decision


def decide(request: Request, norm: str, x: object, weight: Tensor | None) -> Decision:
    """Decide if `request` lowers the call of `norm` for `x` and `weight`."""
    # An fx.Proxy gets here when fx traces.
    if not isinstance(x, Tensor):
        return None, "the input is no tensor"
    # PyTorch's own function hands the call, with ours as the function, to the mode or the
    # subclass that asks for it. What that calls is decided then.
    if has_torch_function_variadic(x, weight) and not (
        norm == HAND_WRITTEN and type(x) is Tensor  # a mode does not see what is written out
    ):
        return None, INTERCEPTED
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return None, NO_AUTOCAST
    if x.dtype not in DTYPES and native.is_left_alone(x):
        return None, str(x.dtype).removeprefix("torch.")
    if weight is not None and weight.dtype not in DTYPES and native.is_left_alone(weight):
        return None, f"{weight.dtype} weight".removeprefix("torch.")
    if norm not in request.norms:
        return None, "not among the norms"
    reason = _exemption.why_stock()
    if reason is not None:
        return None, reason
    if is_dynamo_compiling():
        if _exemption.guard_on_changes():
            return None, ""
        _exemption.guard_on_hooks()
    elif is_tracing():
        return None, "TorchScript"
    if dtype not in request.dtypes:
        return None, _does_not_engage(request.precision, dtype, is_dynamo_compiling())
    if is_compiling() and _exporting.leaves_autocast_out(is_dynamo_compiling()):
        _warn_of_autocast_outside(is_dynamo_compiling())
        return None, "autocast is outside of what is exported"
    return dtype, ""


def run_backend(
    request: Request,
    norm: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Normalise `x` in `dtype`: by the backend in eager mode, natively where code is compiled.

    Args:
        request: The active one, or that of surgery.
        norm: "layer_norm", or "rms_norm". It has no bias, and is native's if the backend has none.
        x: As for a `Backend`, like the arguments after it.
    """
    compiling = is_compiling()
    if norm == "rms_norm":
        rms_norm = native.rms_norm
        if not compiling:
            rms_norm = getattr(request.normalise, "rms_norm", rms_norm)
        return rms_norm(x, normalized_shape, weight, eps, dtype)
    if compiling:
        return native.lower(torch.layer_norm, x, normalized_shape, weight, bias, eps, dtype)
    return request.normalise(x, normalized_shape, weight, bias, eps, dtype)


_logger = logging.getLogger("lpln_autopatch")
_warned: set[str] = set()


@run_while_compiling
def _does_not_engage(precision: Precision, dtype: torch.dtype, compiling: bool) -> str:
    _warn_once(
        f"precision '{precision}' is active, but autocast runs in {dtype}: "
        "norms stay as PyTorch has them. Precision 'amp' engages for float16 and bfloat16.",
        str(precision),
        compiling,
    )
    return f"precision {precision}, autocast to {dtype}"


@run_while_compiling
def _warn_of_autocast_outside(compiling: bool) -> None:
    _warn_once(
        "norms are exported as PyTorch has them: torch.autocast is outside of what is exported, "
        "and the program will run under the autocast of its caller. To export lowered norms, enter "
        "torch.autocast in the module's forward.",
        "export",
        compiling,
    )


def _warn_once(message: str, what: str, compiling: bool) -> None:
    if what in _warned:
        return
    _warned.add(what)
    try:
        warnings.warn(message, NoEffectWarning, stacklevel=_stacklevel_of_caller())
    except NoEffectWarning:  # where warnings are errors
        if not compiling:
            raise
        # Dynamo would report an internal error of its own.
        _logger.warning(message)


def _stacklevel_of_caller() -> int:
    """Return the stacklevel, for the function that warns, of code outside of torch and of us."""
    ours = torch.__path__[0] + os.sep, os.path.dirname(__file__) + os.sep
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    return level


for _function in (decide, decide_and_count, run_backend):
    never_a_frame_of_its_own(_function)
