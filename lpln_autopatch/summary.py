"""LPLN_SUMMARY: a line at exit says how many norm calls were lowered, and why others were not.

It counts decisions, which are made while a precision is active. Compiled code makes none when it
runs: Dynamo makes them where it traces.
"""

from __future__ import annotations

import atexit
import sys
from collections import Counter

import torch

from lpln_autopatch import norms
from lpln_autopatch.forward import INTERCEPTED, Lowering, decide
from lpln_autopatch.torch_compat import is_dynamo_compiling, never_a_frame_of_its_own


def install() -> None:
    """Count from now on, and print the line to stderr when the process ends."""
    counts: Counter[torch.dtype | str] = Counter()

    def counted(
        lowering: Lowering, norm: str, x: object, weight: torch.Tensor | None
    ) -> torch.dtype | str:
        decision = decide(lowering, norm, x, weight)
        # A call that a mode or a subclass intercepts is decided once more.
        if not is_dynamo_compiling() and decision != INTERCEPTED:
            counts[decision] += 1
        return decision

    never_a_frame_of_its_own(counted)
    # In the place of the name, because a hook in the hot path would cost every program.
    vars(norms)["decide"] = counted
    atexit.register(lambda: sys.stderr and print(_line(counts), file=sys.stderr))


def _line(counts: Counter[torch.dtype | str]) -> str:
    stock = {reason: n for reason, n in counts.most_common() if isinstance(reason, str)}
    lowered = counts.total() - sum(stock.values())
    line = f"lpln_autopatch: {lowered} of {counts.total()} norm calls in eager mode were lowered"
    if stock:
        line += f"; stock: {', '.join(f'{n} ({reason})' for reason, n in stock.items())}"
    return f"{line}. Compiled code is not counted."
