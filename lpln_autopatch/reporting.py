"""What is lowered in a model and what is not, and why: by looking at it, without running it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch

from lpln_autopatch import state
from lpln_autopatch.verdicts import Readings, Verdict, judge


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
            names = " = ".join(name or "(the model)" for name in (row.name, *row.other_names[:2]))
            if more_names := len(row.other_names[2:]):
                names += f" +{more_names}"
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
        raise TypeError(f"report() takes a torch.nn.Module, not {type(model)}.")
    # Not named_modules(remove_duplicate=False), which never ends where modules form a cycle.
    names = defaultdict(list, {id(model): [""]})
    for name, module in model.named_modules():
        for child_name, child in module._modules.items():
            names[id(child)].append(f"{name}.{child_name}" if name else child_name)
    rows = []
    readings: Readings = {}
    for name, module in model.named_modules():
        if (judgement := judge(name, module, readings)) is not None:
            others = tuple(other for other in names[id(module)] if other != name)
            rows.append(Row(name, type(module), *judgement, others))
    return Report(tuple(rows), _in_force())


def _in_force() -> str:
    request = state.current()
    if request is None:
        return "No precision is active: until one is, nothing is lowered but by surgery."
    dtypes = " or ".join(str(dtype) for dtype in request.lowering.dtypes)
    effect = (
        f"lowers under autocast to {dtypes}"
        if dtypes
        else "never engages: nothing is lowered but by surgery"
    )
    active = f"{request.precision}, backend {request.backend}, from {request.source}"
    return f"Active: {active}. It {effect}."
