"""The line at exit: the number of norm calls that were lowered, and why others were not.

It counts decisions, which are made while a precision is active. Compiled code makes no decision
when it runs: Dynamo makes them while it traces, and these are counted apart.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections import Counter

import torch

from lpln_autopatch import _exemption, _forward, _norms
from lpln_autopatch._exempt_by_name import ByName
from lpln_autopatch._forward import INTERCEPTED, NO_AUTOCAST, Decision
from lpln_autopatch._hand_written import kinds
from lpln_autopatch._request import HAND_WRITTEN
from lpln_autopatch._torch_compat import (
    is_dynamo_compiling,
    never_a_frame_of_its_own,
    run_while_compiling,
)

calls: Counter[torch.dtype | str] = Counter()
"""Calls in eager mode, by the dtype to which they were lowered, or by the reason why not."""

traced: Counter[torch.dtype | str] = Counter()
"""Calls that Dynamo has traced, likewise. Their compiled code runs uncounted."""

_everything = False  # LPLN_SUMMARY=1 asks for the line in any case.
_counting = True


def install(everything: bool, names: ByName | None) -> None:
    """Count from now on, and print to stderr when the process ends.

    Args:
        everything: Print the line in any case. False prints it only if norms ran and none was
            lowered, so that counting ends with the first lowered call.
        names: The names of LPLN_EXEMPT.
    """
    global _everything
    _everything = everything
    _forward.counter = _count
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)
    atexit.register(_print, names)


def _count(decision: Decision) -> None:
    dtype, reason = decision
    if is_dynamo_compiling():
        _count_traced(dtype, reason)
    elif _counting and reason != INTERCEPTED and _exemption.why_stock() != kinds.TRIAL:
        calls[dtype or reason] += 1
        if not _everything and dtype is not None:
            _stop_counting()


def _stop_counting() -> None:
    global _counting
    _counting = False
    if "torch._dynamo" not in sys.modules:  # or compiled code may guard on it
        _forward.counter = None


@run_while_compiling
def _count_traced(dtype: torch.dtype | None, reason: str) -> None:
    if reason != INTERCEPTED:  # a mode or a subclass has it decided once more
        traced[dtype or reason] += 1


def _forget() -> None:
    """Forget the calls in a forked child: its parent made them."""
    calls.clear()
    traced.clear()


def _print(names: ByName | None) -> None:
    lines = [_all_calls() if _everything else _none_lowered()]
    if _everything and (calls or traced):
        others = _others()
        lines.append(others and f"{others}.")
        if names is not None and names.unmatched:
            lines.append(f"LPLN_EXEMPT: no module is called {', '.join(sorted(names.unmatched))}.")
    rank = os.environ.get("RANK")
    who = f"process {os.getpid()}" if rank is None else f"rank {rank}"
    for line in filter(None, lines):
        if sys.stderr:
            print(f"lpln_autopatch, {who}: {line}", file=sys.stderr)


def _reasons(counts: Counter[torch.dtype | str]) -> dict[str, int]:
    return {reason: n for reason, n in counts.most_common() if isinstance(reason, str)}


def _all_calls() -> str | None:
    if not calls and not traced:
        return None
    stock = _reasons(calls)
    lowered = calls.total() - sum(stock.values())
    line = f"{lowered} of {calls.total()} norm calls in eager mode were lowered"
    if stock:
        line += f"; stock: {', '.join(f'{n} ({reason})' for reason, n in stock.items())}"
    return f"{line}. Compiled code is not counted."


def _none_lowered() -> str | None:
    """Return the line about a process in which norms ran and none was lowered, or None."""
    both = calls + traced
    stock = _reasons(both)
    if len(stock) < len(both):
        return None
    reason = next(iter(stock), None)
    others = None if reason == NO_AUTOCAST else _others()  # they would be stock as well
    if reason is None:
        return others and f"no norm was lowered: {others}."
    n = calls.total()
    what = _plural(n, "norm call") if n else "norms ran in compiled code alone"
    return f"{what}, none lowered: {reason}{f'; {others}' if others else ''}."


def _plural(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _others() -> str | None:
    """Return a sentence about norms outside of LPLN_NORMS that were trained, or None.

    Their functions and forwards are not exchanged, so that their calls are not counted. A gradient
    shows that they ran.
    """
    asked = _forward.active.norms
    found = [
        type(each).__name__
        for each in gc.get_objects()
        if issubclass(type(each), torch.nn.Module)
        and _norm_of(type(each)) not in asked
        and any(p is not None and p.grad is not None for p in _parameters(each))
    ]
    if not found or not asked:
        return None
    names = ", ".join(sorted(set(found))[:3])
    modules = _plural(len(found), "module")
    return f"LPLN_NORMS={asked} leaves {modules} ({names}) stock; try LPLN_NORMS=all"


def _parameters(module: torch.nn.Module) -> list[torch.nn.Parameter | None]:
    """Return the module's own parameters; [] if its `__init__` has failed."""
    return list(vars(module).get("_parameters", {}).values())


def _norm_of(cls: type) -> str:
    """Return the norm that modules of `cls` may compute, or ""."""
    if kinds.candidate(cls) is not None:
        return HAND_WRITTEN
    return next((n for n, name in _norms.MODULES.items() if cls.__name__ == name), "")


never_a_frame_of_its_own(_count)
