"""A training step of full-size models, measured: its time and its memory.

Models, batches and contenders are the same as in `count`; the weights are random.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from lpln_autopatch import report
from lpln_autopatch.bench import timing, zoo
from lpln_autopatch.bench.batches import loss_of
from lpln_autopatch.bench.contenders import (
    STOCK,
    Contender,
    WrongResult,
    of_models,
    relative_error,
    require,
    sift,
)
from lpln_autopatch.bench.results import Figure, Row
from lpln_autopatch.bench.timing import Progress

LEGEND = """\
batch         items of a training step, forward and backward, without an optimizer
ms            of a step: the median of the rounds
/ stock       time over that of stock: median (quartiles) of the rounds; below 1 is faster
peak GiB      the most memory that was allocated at once, parameters and gradients included
peak / stock  that over stock's; below 1 is less
lowered       of all norm calls of a forward, in eager mode
error         relative, of the loss against that of stock: random weights, and the same dropout"""


def run(options: Namespace, progress: Progress) -> list[Row]:
    """Measure every model in every mode and autocast dtype.

    A wrong model ends the process with a line and status 2.
    """
    rows: list[Row] = []
    try:
        cases = zoo.cases(options, rows)
    except zoo.WrongModel as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    rounds = options.rounds or (2 if options.quick else 10)
    progress.expect(len(cases), rounds * len(cases))
    for case, entry, dtype in cases:
        progress.case(case["model"], case["mode"], case["autocast"])
        if case["mode"] == "compiled":
            torch.compiler.reset()  # beyond the limit of a class's cache, code would run eagerly
        rows += _measure(case, entry, dtype, options.device, rounds, progress)
        gc.collect()  # models have reference cycles
    return rows


def _measure(
    case: dict[str, object],
    entry: zoo.Entry,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    progress: Progress,
) -> list[Row]:
    """Measure a step of one model by every contender."""
    torch.manual_seed(0)
    mode = str(case["mode"])
    model = entry.build(device)
    batch = functools.cache(lambda: entry.batch_on(model, device))  # its error is stock's reason
    autocast = torch.autocast(device.type, dtype=dtype)
    losses: list[torch.Tensor] = []

    def step(run: Callable[..., Any]) -> torch.Tensor:
        with autocast:
            loss = loss_of(run(**batch()))
        torch.autograd.backward(loss)
        model.zero_grad()
        return loss.detach()

    def check(contender: Contender) -> tuple[timing.Entry, dict[str, Figure], float]:
        run = torch.compile(model) if mode == "compiled" else model
        figures: dict[str, Figure] = {}
        with contender.applied(model):
            if contender.backend is not None and mode == "eager":
                with autocast, torch.no_grad():
                    found = report(model, **batch())
                if not found.lowered:
                    raise WrongResult(f"it lowers none of {found.calls} norm calls")
                figures["lowered"] = f"{found.lowered} of {found.calls}"
            step(run)  # compiles, and allocates lasting memory
            torch.manual_seed(0)
            peak = _peak_of(lambda: losses.append(step(run)), device)
        error = relative_error(losses[-1], losses[0].double())
        require({"loss": error}, {"loss": 4 * torch.finfo(dtype).eps})
        figures["error"] = error
        context = functools.partial(contender.applied, model)
        return timing.Entry(contender.name, context, functools.partial(step, run)), figures, peak

    passed, reasons = sift(of_models(mode, str(case["norms"])), check)
    rows = [Row(case, contender.name, reason=reason) for contender, reason in reasons.items()]
    if STOCK not in passed:
        return rows[:1]
    timing.interleave([timed for timed, *_ in passed.values()], device, rounds, progress)
    stock, _, stock_peak = passed[STOCK]
    for contender, (timed, figures, peak) in passed.items():
        shown: dict[str, Figure] = {}
        if device.type != "cpu":
            shown |= {"ms": 1e3 * statistics.median(timed.seconds), "peak GiB": peak / 2**30}
        if contender != STOCK:
            shown["/ stock"] = timed.over(stock)
            if device.type != "cpu":
                shown["peak / stock"] = peak / stock_peak
        rows.append(Row(case, contender.name, {**shown, **figures}))
    return rows


def _peak_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the most bytes allocated at once on `device` during `call`; NaN for the CPU."""
    if device.type == "cpu":
        call()
        return math.nan
    memory: Any = getattr(torch, device.type)  # torch.cuda, torch.xpu
    memory.reset_peak_memory_stats(device)
    call()
    return float(memory.max_memory_allocated(device))
