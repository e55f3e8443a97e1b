"""A training step under CUDA's autocast, counted without a GPU: no clock, no chance.

An eager step runs on the emulated accelerator, by our own path for accelerators. A compiled step is
counted from the graphs of AOTAutograd and Inductor.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lpln_autopatch.bench import compiled, counting, emulated, kernels, zoo
from lpln_autopatch.bench.batches import MAKE_BATCH, loss_of, why_not_fed
from lpln_autopatch.bench.contenders import STOCK, Contender, of_models, sift
from lpln_autopatch.bench.results import Row, not_measured
from lpln_autopatch.bench.timing import Progress

LEGEND = """\
batch          items of a training step, forward and backward
norms lowered  by native, of all norms that it runs as norms
kept           bytes that autograd keeps from forward to backward, in GiB
moved          bytes that all operators read and write
peak           the most bytes that were alive at once, without an optimizer
least ms       a bound for an A100 from bytes and FLOPs, no measurement (--all-columns)
kernels        of compiled code
native, lean; with --all-columns fused and recipe (Composer's): as ratios to stock, in the column
before; below 1 is less"""
COLUMNS = {
    "eager": {"kept": "kept GiB", "moved": "moved GiB", "peak": "peak GiB"},
    "compiled": {"kept": "kept GiB", "moved": "moved GiB", "kernels": "kernels"},
}
MORE_COLUMNS: dict[str, dict[str, str]] = {"eager": {"least_ms": "least ms"}, "compiled": {}}
MORE_CONTENDERS = ("fused", "recipe")
"""The contenders that the table shows only with --all-columns."""


def run(options: Namespace, progress: Progress) -> list[Row]:
    """Count every model in every mode and autocast dtype.

    A wrong model ends the process with a line and status 2.
    """
    rows: list[Row] = []
    try:
        emulated.add_device()
        cases = zoo.cases(options, rows)
        steps = [len(of_models(str(case["mode"]), str(case["norms"]))) for case, *_ in cases]
        progress.expect(len(cases), sum(steps))
        for case, entry, dtype in cases:
            progress.case(case["model"], case["mode"], case["autocast"])
            rows += _count(case, entry, dtype, progress)
        if cases and not any(row.figures for row in rows):
            last = rows[-1]
            raise zoo.WrongModel(f"{last.case['model']} cannot be counted: {last.reason}")
    except zoo.WrongModel as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    return rows


def _count(
    case: dict[str, object], entry: zoo.Entry, dtype: torch.dtype, progress: Progress
) -> list[Row]:
    """Count a step of a model by every contender."""
    mode, model = str(case["mode"]), entry.build()
    if (why := why_not_fed(model)) is not None:
        return [Row(case, STOCK.name, reason=why)]
    measure = compiled.count if mode == "compiled" else _eager

    def check(contender: Contender) -> dict[str, Any]:
        progress.step(contender.name)
        backend = kernels.NAMES.get(contender.name, contender.backend)
        with kernels.named(), dataclasses.replace(contender, backend=backend).applied(model):
            return measure(entry, model, dtype)

    passed, reasons = sift(of_models(mode, str(case["norms"])), check)
    if STOCK not in passed:
        own = hasattr(model, "make_batch")
        hint = "" if own else f". If it needs other inputs, give it {MAKE_BATCH}"
        return [Row(case, STOCK.name, reason=reasons[STOCK] + hint)]
    for figures in passed.values():
        for what in ("kept", "moved", "peak", "least_ms"):
            if figures.get(what):
                figures[f"{what} / stock"] = figures[what] / passed[STOCK][what]
    return [
        *(Row(case, contender.name, figures) for contender, figures in passed.items()),
        *(Row(case, contender.name, reason=reason) for contender, reason in reasons.items()),
    ]


def _eager(entry: zoo.Entry, model: torch.nn.Module, dtype: torch.dtype) -> dict[str, float]:
    with emulated.accelerator() as policy:
        emulated.move(model)
        batch = entry.batch_on(model, emulated.NAME)

        def forward() -> torch.Tensor:
            with torch.autocast(emulated.NAME, dtype=dtype):
                return loss_of(model(**batch))

        return counting.count(forward, model, policy, batch)


def table(rows: Sequence[Row], options: Namespace) -> str:
    """Return a line for each model, in Markdown: stock in GiB, the others as ratios to it."""
    from tabulate import tabulate

    blocks: list[str] = []
    cases: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row.reason is None:
            of_kind = cases.setdefault((str(row.case["mode"]), str(row.case["autocast"])), {})
            of_kind.setdefault(row.title, {})[row.contender] = row
    for (mode, dtype), models in cases.items():
        hidden = (STOCK.name, *(() if options.all_columns else MORE_CONTENDERS))
        others = dict.fromkeys(c for rows in models.values() for c in rows if c not in hidden)
        columns = {**COLUMNS[mode], **(MORE_COLUMNS[mode] if options.all_columns else {})}
        header = [f"{mode}, {dtype}", "batch", *["norms lowered"] * (mode == "eager")]
        for column in columns.values():
            header += [column, *others]
        lines = [_line(of_model, mode, columns, list(others)) for of_model in models.values()]
        blocks.append(tabulate(lines, header, "github", disable_numparse=True) + "\n")
    return "\n".join([*blocks, *not_measured(rows)])


def _line(
    rows: dict[str, Row], mode: str, columns: Mapping[str, str], others: Sequence[str]
) -> list[str]:
    case, stock = rows[STOCK.name].case, rows[STOCK.name].figures
    of = f" ({case['of']})" if "of" in case else ""
    line = [f"{case['model']}{of}", str(case["batch"])]
    if mode == "eager":
        native = rows["native"].figures if "native" in rows else {}
        line.append(f"{native.get('lowered_calls', '-')} of {native.get('norm_calls', '-')}")
    for what, column in columns.items():
        own: Any = stock[what]
        line.append(f"{own / 2**30:.2f}" if column.endswith("GiB") else f"{own:.4g}")
        for other in others:
            theirs: Any = rows[other].figures[what] if other in rows else None
            ratio = theirs if what == "kernels" or theirs is None else f"{theirs / own:.3f}"
            line.append("-" if ratio is None else str(ratio))
    return line
