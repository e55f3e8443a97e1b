"""The hot path: is this call lowered, to which dtype, and by which backend."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from lpln_autopatch import _exemption, _exporting
from lpln_autopatch._precision import NoEffectWarning
from lpln_autopatch._torch_compat import (
    autocast_dtype,
    is_compiling,
    is_dynamo_compiling,
    is_tracing,
    never_a_frame_of_its_own,
    run_while_compiling,
)
from lpln_autopatch.backends import Backend, native
from lpln_autopatch.backends.gradients import DTYPES

HAND_WRITTEN = "hand_written"
"""What `norms` and LPLN_NORMS call the norms that classes write out."""

INTERCEPTED = "__torch_function__"
"""Why a call is stock whose mode, or whose tensor's class, gets it from PyTorch's own function."""


@dataclasses.dataclass(frozen=True)
class Lowering:
    """How calls are lowered while a precision is active.

    Attributes:
        precision: Its name, for the warning when it does not engage.
        dtypes: The autocast dtypes for which it engages; twice the same if it is one.
        norms: The names of the norms that are lowered, separated by commas; "" lowers none.
        backend: What normalises a LayerNorm, and an RMSNorm if it can.
    """

    # Dynamo reads the values for its guards after it has compiled, and another thread may have put
    # another Lowering there by then. So what traced code reads has one shape in all of them.

    precision: str
    dtypes: tuple[torch.dtype, ...]
    norms: str
    backend: Backend


INACTIVE = Lowering("", (torch.float16, torch.bfloat16), "", native.normalise)
"""While no precision is active."""


# A plain global, because Dynamo guards on one: compiled code follows every change, and keeps
# the lowered and the stock variant side by side. Reading a ContextVar would break the graph.
active: Lowering = INACTIVE


def decide(lowering: Lowering, norm: str, x: object, weight: Tensor | None) -> torch.dtype | str:
    """The dtype to which the call of `norm` for `x` and `weight` is lowered, or why it is stock."""
    # An fx.Proxy gets here when fx traces.
    if not isinstance(x, Tensor):
        return "the input is no tensor"
    # PyTorch's own function hands the call, with ours as the function, to the mode or the
    # subclass that asks for it. What that calls is decided then.
    if has_torch_function_variadic(x, weight) and not (
        norm == HAND_WRITTEN and type(x) is Tensor  # a mode does not see what is written out
    ):
        return INTERCEPTED
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return "no autocast"
    if x.dtype not in DTYPES and native.is_left_alone(x):
        return str(x.dtype).removeprefix("torch.")
    if weight is not None and weight.dtype not in DTYPES and native.is_left_alone(weight):
        return f"{weight.dtype} weight".removeprefix("torch.")
    if norm not in lowering.norms:
        return "not among the norms"
    reason = _exemption.why_stock()
    if reason is not None:
        return reason
    if is_dynamo_compiling():
        # Dynamo guards on what it compares.
        if _exemption.changes == "":
            return ""
        _exemption.guard_on_hooks()
    elif is_tracing():
        return "TorchScript"
    if dtype not in lowering.dtypes:
        _warn_of_other_dtype(lowering.precision, dtype, is_dynamo_compiling())
        return f"precision {lowering.precision}, autocast to {dtype}"
    if is_compiling() and _exporting.leaves_autocast_out(is_dynamo_compiling()):
        _warn_of_autocast_outside(is_dynamo_compiling())
        return "autocast is outside of what is exported"
    return dtype


def run_backend(
    lowering: Lowering,
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
        lowering: The one that is active.
        norm: "layer_norm", or "rms_norm", which has no bias. A backend without an `rms_norm` leaves
            that to native.
        x: As for a `Backend`; and so are the others.
    """
    compiling = is_compiling()
    if norm == "rms_norm":
        rms_norm = native.rms_norm
        if not compiling:
            rms_norm = getattr(lowering.backend, "rms_norm", rms_norm)
        return rms_norm(x, normalized_shape, weight, eps, dtype)
    if compiling:
        return native.lower(torch.layer_norm, x, normalized_shape, weight, bias, eps, dtype)
    return lowering.backend(x, normalized_shape, weight, bias, eps, dtype)


_logger = logging.getLogger("lpln_autopatch")
_warned: set[str] = set()


@run_while_compiling
def _warn_of_other_dtype(precision: str, dtype: torch.dtype, compiling: bool) -> None:
    _warn_once(
        f"precision {precision!r} is active, but autocast runs in {dtype}: "
        "norms stay as PyTorch has them. Precision 'amp' engages for float16 and bfloat16.",
        precision,
        compiling,
    )


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
        warnings.warn(message, NoEffectWarning, stacklevel=3)
    except NoEffectWarning:  # where warnings are errors
        if not compiling:
            raise
        # Dynamo would call it an internal error of its own, and ask for a report.
        _logger.warning(message)


for _function in (decide, run_backend):
    never_a_frame_of_its_own(_function)
