"""The report: run a model once, and record for each norm call if it is lowered, and why not."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

from lpln_autopatch import _tables
from lpln_autopatch._recorder import Recorder, Row, norms_among
from lpln_autopatch._torch_compat import compiled_code_runs_eagerly
from lpln_autopatch.surgery import check_is_module


@dataclasses.dataclass(frozen=True)
class Report:
    """The norm calls of a model, then the norms that were not called. Prints as a table.

    Attributes:
        rows: One row for all like calls of a module.
        training: The mode in which the model ran and is left; None if it did not run.
    """

    rows: tuple[Row, ...]
    training: bool | None

    @property
    def calls(self) -> int:
        """The number of norm calls."""
        return sum(row.calls for row in self.rows)

    @property
    def lowered(self) -> int:
        """The number of norm calls that were lowered."""
        return sum(row.calls for row in self.rows if row.lowered)

    def __str__(self) -> str:
        table, below = _tables.of_report(self.rows, self.training)
        return f"{_tables.text(table)}\n\n{below}"

    def _repr_html_(self) -> str:
        table, below = _tables.of_report(self.rows, self.training)
        return _tables.html(table, True, below)


def report(model: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Report:
    """Run `model` once, and report for each norm call if it was lowered, and why not.

    It runs as your own call of `model` would: under the active precision and autocast, with
    gradients or without, in the model's present mode. `train()` and `eval()` are not called: in
    training mode a BatchNorm updates its statistics, and dropout draws random numbers. Compiled
    code runs eagerly. Calls in other threads are not recorded. No hook or wrapper is left behind.

    The report has the calls of `torch.nn.functional.layer_norm`, `group_norm` and `rms_norm`, of
    modules under surgery, and of modules that compute a norm by hand or have the name of a norm.

    Args:
        model: Any module, also a compiled one, or one that is wrapped for distribution.
        args: Inputs of the model. Without inputs the model does not run, and the report lists its
            norms. That works on the meta device too.
        kwargs: Inputs by name.

    Returns:
        A report that prints as a table.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        Exception: the error that `model` raises, with a note: the norm calls until then, and the
            module to exempt.
    """
    check_is_module(model, "report")
    model = _uncompiled(model)
    names = {module: name for name, module in model.named_modules()}
    if not args and not kwargs:
        return Report(tuple(norms_among(names)), None)
    training = model.training
    recorder = Recorder(names)
    noted = _tables.failure_noted(recorder)
    with _one_at_a_time, compiled_code_runs_eagerly(), noted, recorder.in_place():
        model(*args, **kwargs)
    uncalled = {module: name for module, name in names.items() if module not in recorder.called}
    return Report((*recorder.counted(), *norms_among(uncalled, "not called")), training)


# Recorders are taken off in reverse order. The lock is reentrant: a model may report on a part of
# itself.
_one_at_a_time = threading.RLock()


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module from which `torch.compile` made `model`, or `model` itself."""
    is_compiled = type(model).__module__.startswith("torch._dynamo.")
    return getattr(model, "_orig_mod", model) if is_compiled else model
