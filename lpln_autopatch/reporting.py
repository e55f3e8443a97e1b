"""What is lowered in a model and what is not, and why: by looking at it, without running it."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections import defaultdict
from typing import Any

import torch
from torch.nn.modules.normalization import LayerNorm

from lpln_autopatch import forward, inspection, state
from lpln_autopatch.surgery import LPLayerNorm


class Verdict(str, enum.Enum):
    """What becomes of the calls of a norm-like module while a precision is active.

    Attributes:
        LOWERED: It runs `torch.nn.LayerNorm.forward`: lowered.
        SURGERY: Surgery lowers it, whether or not a precision is active.
        MAYBE: A forward of its own runs, and may call the one that is lowered; the reason says
            what can be told. Not counted as covered.
        EXEMPT: Stock: marked by `exempt`.
        STOCK: Stock: float64 parameters, TorchScript, a precision that never engages.
        OVERRIDES: Stock: its class has a forward of its own.
        INSTANCE: Stock: it carries a forward of its own.
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


@dataclasses.dataclass(frozen=True)
class Row:
    """A norm-like module.

    Attributes:
        name: Its qualified name in the model; "" is the model itself.
        module_class: Its class.
        verdict: What becomes of its calls.
        reason: Why.
        other_names: Further names of the same module. It is counted once.
    """

    name: str
    module_class: type[torch.nn.Module]
    verdict: Verdict
    reason: str
    other_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """The norm-like modules of a model. Prints as a table.

    Attributes:
        rows: One for each, in the order of `named_modules`.
        in_force: What is in force for those that are lowered, in a sentence.
    """

    rows: tuple[Row, ...]
    in_force: str

    @property
    def summary(self) -> str:
        """How many of how many are covered, in a line."""
        covered = sum(row.verdict.covered for row in self.rows)
        unsure = sum(row.verdict is Verdict.MAYBE for row in self.rows)
        more = f", {unsure} more may be" if unsure else ""
        return f"{covered} of {len(self.rows)} norm-like modules are covered{more}."

    def __str__(self) -> str:
        table = [("name", "class", "verdict", "reason")]
        for row in self.rows:
            names = " = ".join(name or "(the model)" for name in (row.name, *row.other_names))
            table.append((names, row.module_class.__name__, str(row.verdict), row.reason))
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]])
            for line in table
        ]
        return "\n".join([*lines, "", self.summary, self.in_force])


def report(model: torch.nn.Module) -> Report:
    """Say of every norm-like module of `model` whether its calls are lowered, and why.

    Norm-like is what is a LayerNorm, derives from another norm of torch.nn, is called a norm and
    has no modules inside, or calls `layer_norm` in its forward. It is looked at and never run, and
    nothing is patched: a module that the model never calls is reported like one that it does.

    "Lowered" holds while a precision is active that engages for the autocast dtype, and autocast
    is on; the report's last line says what is in force now. It may be asked before: what runs
    LayerNorm.forward will be lowered by whatever becomes active.

    Args:
        model: Any module, compiled or wrapped for distribution or not.

    Returns:
        One row for each, and what is in force. Prints as a table.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"report() takes a torch.nn.Module, not {model!r}.")
    # Not named_modules(remove_duplicate=False), which never ends where modules form a cycle.
    names = defaultdict(list, {id(model): [""]})
    for name, module in model.named_modules():
        for child_name, child in module._modules.items():
            names[id(child)].append(f"{name}.{child_name}" if name else child_name)
    rows = []
    for name, module in model.named_modules():
        if (judgement := _judge(name, module)) is not None:
            others = tuple(other for other in names[id(module)] if other != name)
            rows.append(Row(name, type(module), *judgement, others))
    return Report(tuple(rows), _in_force())


_Judgement = tuple[Verdict, str]

# Not "Normalize", which is of data, nor "NormalMLP".
_NAMED_NORM = re.compile(r"norm(?!al)", re.IGNORECASE)


def _judge(name: str, module: torch.nn.Module) -> _Judgement | None:
    """The verdict on `module` and its reason, or None if it is nothing like a norm."""
    cls = type(module)
    if issubclass(cls, LayerNorm):
        return _judge_layer_norm(module)
    if issubclass(cls, torch.jit.ScriptModule):
        original = str(getattr(module, "original_name", ""))
        if _NAMED_NORM.search(original) and not module._modules:
            return Verdict.STOCK, f"{original} in TorchScript, which has the stock forward"
        return None
    if inspection.calls_layer_norm(cls.forward, cls):
        return Verdict.OTHER, f"{cls.__name__}.forward calls layer_norm by itself"
    if _is_called_norm(name, module):
        return Verdict.OTHER, f"{cls.__name__} does not run LayerNorm.forward"
    return None


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
    if getattr(module, forward.EXEMPT, False):
        return Verdict.EXEMPT, "marked by exempt()"
    if any(p is not None and p.dtype is torch.float64 for p in module._parameters.values()):
        return Verdict.STOCK, "float64 parameters: autocast never touches float64"
    return judgement


def _judge_forward(module: torch.nn.Module) -> _Judgement:
    """By the forward that `module` runs: its own, or the first that its class finds."""
    own = vars(module)
    if "forward" not in own:
        base = next(base for base in type(module).__mro__ if "forward" in vars(base))
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
    if forward.active is not None and not inspection.wraps_ours(on_top):
        return Verdict.MAYBE, f"LayerNorm.forward is {on_top!r} now, not ours"
    return Verdict.LOWERED, "runs LayerNorm.forward"


def _judge_function(
    module: torch.nn.Module, function: Any, what: str, stock: Verdict
) -> _Judgement:
    """A forward that the class or the module has; `stock` is the verdict if it is not lowered."""
    cls = type(module)
    if getattr(function, "__func__", function) is LPLayerNorm.forward:
        return _judge_surgery(module)
    if inspection.is_ours(function):
        return Verdict.LOWERED, f"{what} is LayerNorm.forward"
    if inspection.is_torchs_original(function):
        return stock, f"{what} is LayerNorm.forward as it was before the activation"
    if not inspection.can_be_read(function):
        return Verdict.MAYBE, f"{what} has no Python code to look at"
    if inspection.wraps_ours(function) or inspection.names_a_forward(function, cls):
        return Verdict.MAYBE, f"{what} calls another forward, and may change what that gives"
    if inspection.calls_layer_norm(function, cls):
        return stock, f"{what} calls layer_norm by itself"
    return stock, f"{what} runs in place of LayerNorm.forward"


def _judge_surgery(module: Any) -> _Judgement:
    lowering = module._lowering
    if not lowering.dtypes:
        return Verdict.STOCK, f"surgery with precision {lowering.precision}, which never engages"
    return Verdict.SURGERY, f"precision {lowering.precision} of its own"


def _in_force() -> str:
    request = state.current()
    if request is None:
        return "No precision is active: until one is, only surgery lowers anything."
    dtypes = " or ".join(str(dtype) for dtype in request.lowering().dtypes)
    effect = f"under autocast to {dtypes}" if dtypes else "never: only surgery lowers anything"
    return (
        f"Active: {request.precision}, backend {request.backend}, from {request.source}; {effect}."
    )
