"""What happens to every norm call of a model, and why: seen by running it once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpln_autopatch import exemption, forward, state, tables
from lpln_autopatch.exchange import is_torchs_own
from lpln_autopatch.norms import FUNCTIONS
from lpln_autopatch.surgery import check_is_module, is_under_surgery, runs_torchs_forward
from lpln_autopatch.torch_compat import (
    autocast_dtype,
    compiled_code_runs_eagerly,
    every_module_hooked,
    uncompiled,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Norm calls of one module that are alike.

    Attributes:
        name: The qualified name of the innermost module that was running; "" is the model itself.
        norm: "layer_norm", "group_norm" or "rms_norm"; of a module that called none its class.
        calls: How many there were.
        input_dtype: The dtype that went in. None if there was no call.
        output_dtype: The dtype that came out, likewise.
        lowered: Whether they ran in the autocast dtype.
        reason: Why they did not; or who lowered them, where the precision in force did not.
    """

    name: str
    norm: str
    calls: int
    input_dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    lowered: bool
    reason: str


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
        table, below = tables.of_report(self)
        return f"{tables.text(table)}\n\n{below}"

    def _repr_html_(self) -> str:
        table, below = tables.of_report(self)
        return tables.html(table, True, below)


def report(model: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Report:
    """Run `model` once, and say of every norm call whether it was lowered, and why not.

    It runs as a call of `model` here would: under the precision and the autocast in force, with
    gradients or without, in the training mode that it is in. `train()` and `eval()` are not called:
    in training mode a BatchNorm updates its statistics, and dropout draws random numbers. Compiled
    code runs eagerly. Calls in other threads are not seen. No hook or wrapper is left behind.

    Seen are the calls of `torch.nn.functional.layer_norm`, `group_norm` and `rms_norm`, those of
    modules under surgery, and modules that are norms by their class and call none of these.

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
        return Report(tuple(_norms(names)), None)
    training = model.training
    recorder = Recorder(names)
    noted = tables.failure_noted(recorder)
    with _one_at_a_time, compiled_code_runs_eagerly(), noted, recorder.in_place():
        model(*args, **kwargs)
    uncalled = {module: name for module, name in names.items() if module not in recorder.called}
    return Report((*recorder.counted(), *_norms(uncalled, "not called")), training)


class Recorder:
    """Sees the norm calls of this thread, in modules that have these names."""

    def __init__(self, names: Mapping[torch.nn.Module, str]) -> None:
        self.rows: Counter[Row] = Counter()  # and the calls of each
        self.last: Row | None = None
        self.called: set[torch.nn.Module] = set()
        self._names = names
        self._thread: int | None = threading.get_ident()
        # The modules that are running, their names, and how many calls there were before.
        self._running: list[tuple[torch.nn.Module | None, str, int]] = [(None, "", 0)]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Record what happens inside."""
        runs = state.recorder or FUNCTIONS  # a model may report on a part of itself
        recorders = {n: functools.partial(self._call, n, f) for n, f in runs.items()}
        # Another patcher's function may not call PyTorch's.
        foreign = {n: f for n in FUNCTIONS if not is_torchs_own(f := getattr(F, n), F, n)}
        above = {n: functools.partial(self._call, n, f) for n, f in foreign.items()}
        try:
            with state.recording(recorders), every_module_hooked(self._enter, self._leave):
                for norm, recorder in above.items():
                    setattr(F, norm, functools.update_wrapper(recorder, foreign[norm]))
                yield
        finally:
            self._thread = None  # what another patcher has wrapped since cannot be taken off
            for norm, recorder in above.items():
                if getattr(F, norm) is recorder:
                    setattr(F, norm, foreign[norm])

    def _call(self, norm: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # What a backend calls is a part of a call of ours.
        if threading.get_ident() != self._thread or exemption.why_stock() not in (None, "exempt"):
            return function(*args, **kwargs)
        x = args[0] if args else kwargs.get("input")
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        decision = _decide(forward.active, norm, x, weight)
        before = self.rows.total()
        y = function(*args, **kwargs)
        if self.rows.total() == before:  # or a function mode, or a tensor's class, called it anew
            self._record(norm, x, y, decision)
        return y

    def _enter(self, module: torch.nn.Module, args: object) -> None:
        if threading.get_ident() == self._thread:
            name = self._names.get(module, self._running[-1][1])
            self._running.append((module, name, self.rows.total()))
            self.called.add(module)

    def _leave(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Not the last one, where a module above it raised, before torch 2.1.
        found = [at for at, running in enumerate(self._running) if running[0] is module]
        if threading.get_ident() == self._thread and found:
            del self._running[found[-1] + 1 :]
            if output is not None and self._running[-1][2] == self.rows.total():
                given = _first_tensor((*args, *kwargs.values()))
                self._record_module(module, given, _first_tensor(output))
            self._running.pop()

    def _record_module(self, module: Any, x: Tensor | None, y: Tensor | None) -> None:
        """Record the call of a module that has called no function."""
        by, lowering = "", forward.active
        if is_under_surgery(module):
            by, lowering = "surgery", module._lowering
        elif not runs_torchs_forward(module):  # which is another patcher's, if it calls none
            if _is_norm(self._running[-1][1], module):
                reason = "calls no norm function of torch.nn.functional"
                self._record(type(module).__name__, x, y, reason)
            return
        decision = _decide(lowering, "layer_norm", x, module.weight)
        is_exempt = exemption.is_marked(module)
        self._record("layer_norm", x, y, "exempt" if is_exempt else decision, by)

    def _record(self, norm: str, x: Any, y: Any, decision: torch.dtype | str, by: str = "") -> None:
        given, got = getattr(x, "dtype", None), getattr(y, "dtype", None)
        lowered, reason = got == decision, by
        if not lowered and given is torch.float32 and got == autocast_dtype(x.device.type):
            # PyTorch's own give float32 for float32. Surgery decides inside a mode, unseen.
            lowered, reason = True, by or "another patcher"
        elif not lowered:
            reason = decision if isinstance(decision, str) else f"another patcher gives {got}"
        self.last = Row(self._running[-1][1], norm, 0, given, got, lowered, reason)
        self.rows[self.last] += 1

    def counted(self) -> tuple[Row, ...]:
        """Return the rows with their calls."""
        return tuple(dataclasses.replace(row, calls=n) for row, n in self.rows.items())


def _decide(lowering: Any, norm: str, x: object, weight: Any) -> torch.dtype | str:
    if not lowering.norms:
        return "no precision is active"
    return forward.decide(lowering, norm, x, weight)


def _first_tensor(value: object) -> Tensor | None:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return next((each for each in values if isinstance(each, Tensor)), None)


# Wrappers come off in reverse order. Reentrant: a model may report on a part of itself.
_one_at_a_time = threading.RLock()

# A word of its own: not "Normalize", which is of data, nor "NormalMLP", nor "Enormous". BatchNorm
# and InstanceNorm have statistics of their own, and autocast leaves them alone.
_NORM = re.compile(r"(Norm|(^|_)norm|(?i:layer|rms|group)(?i:norm))(?![a-z])(?!\w*Loss)")
_OTHER = re.compile(r"(?i:batch|instance|response)_?(?i:norm)")


def _is_norm(name: str, module: torch.nn.Module) -> bool:
    """Whether `module` is a norm by its class. One with modules inside is a block."""
    if "parametrizations" in name.split("."):  # weight_norm and spectral_norm are modules
        return False
    called = type(module).__name__
    inside = module._modules.keys() - {"parametrizations"}
    is_one = _NORM.search(called) and not _OTHER.search(called) and not inside
    return bool(is_one) or isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))


def _norms(names: Mapping[torch.nn.Module, str], reason: str = "") -> Iterator[Row]:
    """A row without calls for each norm among these. The reason is this one or the norm's mark."""
    for module, name in names.items():
        if _is_norm(name, module):
            surgery = "surgery" if is_under_surgery(module) else ""
            mark = "exempt" if exemption.is_marked(module) else surgery
            yield Row(name, type(module).__name__, 0, None, None, False, reason or mark)
