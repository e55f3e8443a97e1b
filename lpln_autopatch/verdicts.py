"""What becomes of the calls of one module: the verdicts of the report, and their reasons."""

from __future__ import annotations

import enum
import re
from typing import Any

import torch
from torch.nn.modules.normalization import LayerNorm

from lpln_autopatch import exemption, forward, inspection
from lpln_autopatch.surgery import LPLayerNorm


class Verdict(str, enum.Enum):
    """What becomes of the calls of a norm-like module while a precision is active.

    Attributes:
        LOWERED: It runs `torch.nn.LayerNorm.forward`: lowered.
        SURGERY: Surgery lowers it, whether or not a precision is active.
        MAYBE: It cannot be told by looking; the reason says why, as that a forward of its own
            may call the one that is lowered. Not counted as covered.
        EXEMPT: Stock: marked by `exempt`.
        STOCK: Stock: float64 parameters, TorchScript, a precision that never engages.
        OVERRIDES: Stock: its class has a forward of its own, which calls no other.
        INSTANCE: Stock: it carries a forward of its own, which calls no other that is lowered.
        OTHER: Stock: no `torch.nn.LayerNorm`.
    """

    LOWERED = "lowered"
    SURGERY = "surgery"
    MAYBE = "may be lowered"
    EXEMPT = "exempt"
    STOCK = "stock"
    OVERRIDES = "overrides forward"
    INSTANCE = "instance forward"
    OTHER = "not a LayerNorm"

    def __str__(self) -> str:
        return self.value

    @property
    def covered(self) -> bool:
        """Whether its calls are lowered: `LOWERED` or `SURGERY`."""
        return self in (Verdict.LOWERED, Verdict.SURGERY)


_Judgement = tuple[Verdict, str]
Readings = dict[int, inspection.Reading]

# A word of its own: not "Normalize", which is of data, nor "NormalMLP", nor "Enormous".
_NAMED_NORM = re.compile(
    r"(Norm|(^|_)norm|(?i:layer|rms|batch|group|instance)(?i:norm))(?![a-z])(?!\w*Loss)"
)


def judge(name: str, module: torch.nn.Module, readings: Readings) -> _Judgement | None:
    """The verdict on `module` and its reason, or None if it is nothing like a norm.

    Args:
        name: Its name in the model.
        module: The module, which is not run.
        readings: What was read already of the forwards of classes, by the id of the class. Not
            kept from one report to the next: what a forward's closure holds would never die.
    """
    try:
        return _judge(name, module, readings)
    except Exception as error:  # of the module's own making: one is not to take the others along
        return Verdict.MAYBE, f"cannot be looked at: {type(error).__name__}: {error}"


def _judge(name: str, module: torch.nn.Module, readings: Readings) -> _Judgement | None:
    cls = type(module)
    if issubclass(cls, LayerNorm):
        return _judge_layer_norm(module)
    if issubclass(cls, torch.jit.ScriptModule):
        original = str(getattr(module, "original_name", ""))
        if _NAMED_NORM.search(original) and not module._modules:
            return Verdict.STOCK, f"{original} in TorchScript, which has the stock forward"
        return None
    function = vars(module).get("forward")
    if function is not None:
        reading = inspection.read(function, cls)
    else:
        function = cls.forward
        if id(cls) not in readings:
            readings[id(cls)] = inspection.read(function, cls)
        reading = readings[id(cls)]
    if not reading.calls_layer_norm and not _is_called_norm(name, module):
        return None
    what = f"{cls.__name__}.forward"
    if inspection.wraps_ours(function) or reading.calls_a_forward:
        return Verdict.MAYBE, f"{what} calls another forward, and may change what that gives"
    if reading.calls_layer_norm:
        return Verdict.OTHER, f"{what} calls layer_norm by itself"
    return Verdict.OTHER, f"{cls.__name__} does not run LayerNorm.forward"


def _is_called_norm(name: str, module: torch.nn.Module) -> bool:
    # weight_norm and spectral_norm are modules too, but of parameters.
    if "parametrizations" in name.split("."):
        return False
    of_torch = (
        c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules.")
    )
    if any(_NAMED_NORM.search(called) for called in of_torch):
        return True
    # One with modules inside is a block: its norm is one of those.
    inside = module._modules.keys() - {"parametrizations"}
    return not inside and _NAMED_NORM.search(type(module).__name__) is not None


def _judge_layer_norm(module: torch.nn.Module) -> _Judgement:
    judgement = _judge_forward(module)
    if not judgement[0].covered and judgement[0] is not Verdict.MAYBE:
        return judgement
    if exemption.MARK in vars(module):
        return Verdict.EXEMPT, "marked by exempt()"
    if any(p is not None and p.dtype is torch.float64 for p in module._parameters.values()):
        return Verdict.STOCK, "float64 parameters: autocast never touches float64"
    return judgement


def _judge_forward(module: torch.nn.Module) -> _Judgement:
    """By the forward that `module` runs: its own, or the first that its class finds."""
    own, cls = vars(module), type(module)
    for name in ("__call__", "_call_impl"):
        if getattr(cls, name) is not getattr(torch.nn.Module, name):
            return Verdict.MAYBE, f"{cls.__name__}.{name} is its own, and may run anything"
    if "forward" not in own:
        base = next(base for base in cls.__mro__ if "forward" in vars(base))
        if base is LayerNorm:
            return _judge_torchs()
        what = f"{base.__module__}.{base.__qualname__}.forward"
        return _judge_function(module, vars(base)["forward"], what, Verdict.OVERRIDES)
    if "_hf_hook" in own and "_old_forward" in own:
        # It calls what was the module's forward when it was put there.
        what = "the forward in accelerate's hook"
        return _judge_function(module, own["_old_forward"], what, Verdict.INSTANCE)
    return _judge_function(module, own["forward"], "a forward of its own", Verdict.INSTANCE)


def _judge_torchs() -> _Judgement:
    """`LayerNorm.forward` as it is now."""
    on_top = vars(LayerNorm)["forward"]
    if not inspection.is_ours(on_top) and inspection.wraps_ours(on_top):
        return Verdict.MAYBE, f"{on_top!r} is above ours, and may change or replace it"
    if forward.active is not None and not inspection.is_ours(on_top):
        return Verdict.MAYBE, f"LayerNorm.forward is {on_top!r} now, not ours"
    return Verdict.LOWERED, "runs LayerNorm.forward"


def _judge_function(
    module: torch.nn.Module, function: Any, what: str, stock: Verdict
) -> _Judgement:
    """A forward that the class or the module has; `stock` is the verdict if it is not lowered."""
    if inspection.target(function) is LPLayerNorm.forward:
        return _judge_surgery(module)
    if inspection.is_ours(function):
        return Verdict.LOWERED, f"{what} is LayerNorm.forward"
    if inspection.is_torchs_original(function):
        return stock, f"{what} is LayerNorm.forward as it was before the activation"
    if not inspection.can_be_read(function):
        return Verdict.MAYBE, f"{what} has no Python code to look at"
    reading = inspection.read(function, type(module))
    if inspection.wraps_ours(function) or reading.calls_a_forward:
        return Verdict.MAYBE, f"{what} calls another forward, and may change what that gives"
    if reading.calls_layer_norm:
        return stock, f"{what} calls layer_norm by itself"
    if reading.calls_what_is_unknown(module):
        return Verdict.MAYBE, f"{what} calls what cannot be followed from here"
    return stock, f"{what} runs in place of LayerNorm.forward"


def _judge_surgery(module: torch.nn.Module) -> _Judgement:
    lowering = vars(module).get("_lowering")
    if lowering is None:  # reverted since
        return _judge_torchs()
    if not lowering.dtypes:
        return Verdict.STOCK, f"surgery with precision {lowering.precision}, which never engages"
    return Verdict.SURGERY, f"precision {lowering.precision} of its own"
