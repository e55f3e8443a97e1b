"""What happens to every norm call of a model, and why: seen by running it once."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

from lpln_autopatch import _tables
from lpln_autopatch._recorder import Recorder, Row, norms_among
from lpln_autopatch._torch_compat import compiled_code_runs_eagerly, uncompiled
from lpln_autopatch.surgery import check_is_module


@dataclasses.dataclass(frozen=True)
class Report:
    """The norm calls of a model, then the norms that were not called. Prints as a table.

    Attributes:
        rows: A row for the calls of one module that are alike.
        training: The mode in which the model ran, and was left; None if it did not run.
    """

    rows: tuple[Row, ...]
    training: bool | None

    @property
    def calls(self) -> int:
        """How many norm calls there were."""
        return sum(row.calls for row in self.rows)

    @property
    def lowered(self) -> int:
        """How many of them were lowered."""
        return sum(row.calls for row in self.rows if row.lowered)

    def __str__(self) -> str:
        table, below = _tables.of_report(self.rows, self.training)
        return f"{_tables.text(table)}\n\n{below}"

    def _repr_html_(self) -> str:
        table, below = _tables.of_report(self.rows, self.training)
        return _tables.html(table, True, below)


def report(model: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Report:
    """Run `model` once, and say of every norm call whether it was lowered, and why not.

    It runs as a call of `model` here would: under the precision and the autocast in force, with
    gradients or without, in the training mode that it is in. `train()` and `eval()` are not called:
    in training mode a BatchNorm updates its statistics, and dropout draws random numbers. Compiled
    code runs eagerly. Calls in other threads are not seen. No hook or wrapper is left behind.

    Seen are the calls of `torch.nn.functional.layer_norm`, `group_norm` and `rms_norm`, those of
    modules under surgery, and modules that compute a norm by hand, or are norms by their class.

    Args:
        model: Any module, compiled or wrapped for distribution or not.
        args: Its inputs. Without any the model is not run: its norms are listed, on meta too.
        kwargs: Its keyword inputs.

    Returns:
        A report that prints as a table.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        Exception: what `model` raises, with a note: the norm calls until then, and what to exempt.
    """
    check_is_module(model, "report")
    model = uncompiled(model)
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


# Wrappers come off in reverse order. Reentrant: a model may report on a part of itself.
_one_at_a_time = threading.RLock()
