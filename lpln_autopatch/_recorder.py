"""Record the norm calls of a model while it runs."""

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

from lpln_autopatch import _exemption, _forward, _state
from lpln_autopatch._exchange import is_torchs_own
from lpln_autopatch._exemption import EXEMPT
from lpln_autopatch._forward import Decision
from lpln_autopatch._hand_written import forwards
from lpln_autopatch._norms import FUNCTIONS
from lpln_autopatch._request import Request
from lpln_autopatch._torch_compat import autocast_dtype, every_module_hooked
from lpln_autopatch.surgery import is_under_surgery, runs_torchs_forward


@dataclasses.dataclass(frozen=True)
class Row:
    """Norm calls of one module that are alike.

    Attributes:
        name: The qualified name of the innermost module that was running; "" is the model itself.
        norm: "layer_norm", "group_norm" or "rms_norm"; the class of a module that calls none.
        calls: The number of calls.
        input_dtype: The dtype of the input, or None if there was no call.
        output_dtype: The dtype of the output, or None if there was no call.
        lowered: True if the calls ran in the autocast dtype.
        reason: Why they did not; or who lowered them, if it was not the active precision.
    """

    name: str
    norm: str
    calls: int
    input_dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    lowered: bool
    reason: str


class Recorder:
    """Records the norm calls of this thread, by the names of the modules that make them."""

    def __init__(self, names: Mapping[torch.nn.Module, str]) -> None:
        self.rows: list[Row] = []  # one for each call
        self.called: set[torch.nn.Module] = set()
        self._names = names
        self._thread: int | None = threading.get_ident()
        # The modules that are running, their names, and the number of rows when each began.
        self._running: list[tuple[torch.nn.Module | None, str, int]] = [(None, "", 0)]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Record the norm calls inside the block."""
        runs = _state.recorders or FUNCTIONS  # a model may report on a part of itself
        recorders = {n: functools.partial(self._call, n, f) for n, f in runs.items()}
        # A function of another patcher may never call PyTorch's, which ours replaces.
        foreign = {n: f for n in FUNCTIONS if not is_torchs_own(f := getattr(F, n), F, n)}
        above = {n: functools.partial(self._call, n, f) for n, f in foreign.items()}
        try:
            with _state.recording(recorders), every_module_hooked(self._enter, self._leave):
                for norm, recorder in above.items():
                    setattr(F, norm, functools.update_wrapper(recorder, foreign[norm]))
                yield
        finally:
            # A recorder that another patcher has wrapped since cannot be taken off: it ends so.
            self._thread = None
            for norm, recorder in above.items():
                if getattr(F, norm) is recorder:
                    setattr(F, norm, foreign[norm])

    def _call(self, norm: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # The norms that a backend calls are a part of a call that has its row already.
        if threading.get_ident() != self._thread or _exemption.why_stock() not in (None, EXEMPT):
            return function(*args, **kwargs)
        x = args[0] if args else kwargs.get("input")
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        decision = _decide(_forward.active, norm, x, weight)
        before = len(self.rows)
        y = function(*args, **kwargs)
        if len(self.rows) == before:  # or a function mode, or a tensor's class, called this again
            self._record(norm, x, y, decision)
        return y

    def _enter(self, module: torch.nn.Module, args: object) -> None:
        if threading.get_ident() == self._thread:
            name = self._names.get(module, self._running[-1][1])
            self._running.append((module, name, len(self.rows)))
            self.called.add(module)

    def _leave(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Before torch 2.1 the hook of a module that raised does not run: it may still be the last.
        found = [at for at, running in enumerate(self._running) if running[0] is module]
        if threading.get_ident() == self._thread and found:
            del self._running[found[-1] + 1 :]
            if output is not None:
                self._record_module(module, args, kwargs, _first_tensor(output))
            self._running.pop()

    def _record_module(self, module: Any, args: Any, kwargs: Any, y: Tensor | None) -> None:
        before = self._running[-1][2]
        if len(self.rows) > before:
            if _is_norm(self._running[-1][1], module):
                self._cast_back(before, y)
            return
        by, request = "", _forward.active
        x = _first_tensor((*args, *kwargs.values()))
        if is_under_surgery(module):
            by, request = "surgery", module._request
        elif not runs_torchs_forward(module):
            norm, decision = forwards.explain(module, args, kwargs)
            if norm or _is_norm(self._running[-1][1], module):
                self._record(norm or type(module).__name__, x, y, decision)
            return
        decision = _decide(request, "layer_norm", x, module.weight)
        if _exemption.is_exempt(module):
            decision = None, EXEMPT
        self._record("layer_norm", x, y, decision, by)

    def _cast_back(self, start: int, y: Tensor | None) -> None:
        """Mark the rows from `start` on, of one module, as stock if the module returns float32."""
        for at, row in enumerate(self.rows[start:], start):
            if row.lowered and y is not None and y.dtype is torch.float32:
                why = "the module casts it back to float32"
                self.rows[at] = dataclasses.replace(
                    row, output_dtype=torch.float32, lowered=False, reason=why
                )

    def _record(self, norm: str, x: Any, y: Any, decision: Decision, by: str = "") -> None:
        dtype, why = decision
        given, got = getattr(x, "dtype", None), getattr(y, "dtype", None)
        lowered, reason = got is not None and got == dtype, by
        by_others = given is torch.float32 and got == (autocast_dtype(x.device.type) or "stock")
        if not lowered and by_others:
            # PyTorch's own norms return float32 for float32, so that another patcher has lowered
            # it; or surgery has, inside a function mode, where no decision is recorded.
            lowered, reason = True, by or "another patcher"
        elif not lowered:
            reason = why if dtype is None else f"another patcher gives {got}"
        self.rows.append(Row(self._running[-1][1], norm, 1, given, got, lowered, reason))

    def counted(self) -> tuple[Row, ...]:
        """Return one row for all like calls of a module."""
        alike = Counter(self.rows)
        return tuple(dataclasses.replace(row, calls=n) for row, n in alike.items())


def _decide(request: Request, norm: str, x: object, weight: Any) -> Decision:
    if not request.norms:
        return None, "no precision is active"
    return _forward.decide(request, norm, x, weight)


def _first_tensor(value: object) -> Tensor | None:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return next((each for each in values if isinstance(each, Tensor)), None)


# The word Norm by itself: not "Normalize", which is for data, nor "NormalMLP", nor "Enormous".
# Autocast leaves BatchNorm and InstanceNorm alone, which keep statistics.
_NORM = re.compile(r"(Norm|(^|_)norm|(?i:layer|rms|group)(?i:norm))(?![a-z])(?!\w*Loss)")
_OTHER = re.compile(r"(?i:batch|instance|response)_?(?i:norm)")


def _is_norm(name: str, module: torch.nn.Module) -> bool:
    """Return True if `module` has the class of a norm, and no modules inside, as a block has."""
    if "parametrizations" in name.split("."):  # weight_norm and spectral_norm are such modules
        return False
    called = type(module).__name__
    inside = module._modules.keys() - {"parametrizations"}
    is_one = _NORM.search(called) and not _OTHER.search(called) and not inside
    return bool(is_one) or isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))


def norms_among(names: Mapping[torch.nn.Module, str], reason: str = "") -> Iterator[Row]:
    """Yield a row without calls for each norm among `names`.

    Its reason is `reason`, or by default "exempt" or "surgery", or "".
    """
    for module, name in names.items():
        if _is_norm(name, module):
            surgery = "surgery" if is_under_surgery(module) else ""
            mark = EXEMPT if _exemption.is_exempt(module) else surgery
            yield Row(name, type(module).__name__, 0, None, None, False, reason or mark)
