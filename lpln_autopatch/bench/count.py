"""What a training step does under CUDA's autocast, counted without a GPU: no clock, no chance.

Eager on the emulated accelerator, where our own accelerator path runs; compiled by what
AOTAutograd's partitioner keeps and what Inductor makes of it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import torch

from lpln_autopatch import backends
from lpln_autopatch.bench import compiled, counting, emulated, zoo
from lpln_autopatch.bench.batches import loss_of
from lpln_autopatch.bench.options import Options
from lpln_autopatch.bench.policy import MissingPart
from lpln_autopatch.bench.recipe import ComposerRecipe
from lpln_autopatch.bench.results import Figure, Row, short
from lpln_autopatch.bench.rivals import Contender, sift
from lpln_autopatch.bench.timing import Progress

STOCK = Contender("stock")
RECIPE = "recipe"
GIB = 2**30
UNITS = {"kernels": "kernels", "least_ms": "least ms"}


def contenders(mode: str, norms: str) -> list[Contender]:
    """Stock, ours by each backend, and Composer's recipe."""
    # Compiled code is PyTorch's own, whatever the backend.
    ours = ("native", "fused", "lean") if mode == "eager" else ("native",)
    return [
        STOCK,
        *(Contender(b, backend=b, norms=norms) for b in ours if b in backends.names()),
        Contender(RECIPE, lambda: ComposerRecipe, norms=norms),
    ]


def run(options: Options, progress: Progress) -> list[Row]:
    """Count every model in every mode and autocast dtype.

    A wrong model, or a torch without the parts, ends the process with a line and status 2.
    """
    dtypes = options.dtypes or [torch.bfloat16]
    modes = options.modes or ["eager"]
    names = zoo.names(options.models or ["bert-base"] * options.quick)
    rows: list[Row] = []
    progress.reset(len(names) * len(modes) * len(dtypes))
    try:
        emulated.add_device()
        entries = {name: zoo.entry(name) for name in names}
        for name, entry in entries.items():
            if options.norms:
                entry = dataclasses.replace(entry, norms=options.norms)
            for mode in modes:
                for dtype in dtypes:
                    progress.set_description_str(f"count, {name}, {mode}, {short(dtype)}")
                    rows += _count(name, entry, mode, dtype, options)
                    progress.update()
    except (MissingPart, zoo.WrongModel) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    return rows


def _count(
    name: str, entry: zoo.Entry, mode: str, dtype: torch.dtype, options: Options
) -> Iterator[Row]:
    case: dict[str, object] = {"model": name, "mode": mode, "autocast": short(dtype)}
    case |= {"batch": entry.batch, "norms": entry.norms}
    shallow = mode == "compiled" or options.quick
    try:
        model = entry.build(shallow)
    except zoo.WrongModel as error:
        if options.models:
            raise
        yield Row(case, STOCK.name, reason=str(error))  # of the default: its package is not here
        return
    if shallow and entry.shallow:
        case["of"] = entry.depth
    measure = compiled.count if mode == "compiled" else _eager

    def check(contender: Contender) -> dict[str, Figure]:
        if contender.name == "fused":
            raise ImportError("Triton's kernels need a GPU: they do not run without data")
        with contender.applied(model):
            counts = measure(entry, model, dtype)
        return dataclasses.asdict(counts)

    passed, reasons = sift(contenders(mode, entry.norms), torch.device("cpu"), check)
    if STOCK not in passed:
        raise zoo.WrongModel(f"{name} cannot be counted: {reasons[STOCK]}")
    for contender, figures in passed.items():
        for what in ("kept", "moved", "peak", "least_ms"):
            if figures.get(what):
                figures[f"{what} / stock"] = figures[what] / passed[STOCK][what]  # type: ignore[operator]
        yield Row(case, contender.name, figures)
    for contender, reason in reasons.items():
        yield Row(case, contender.name, reason=reason)


def _eager(entry: zoo.Entry, model: torch.nn.Module, dtype: torch.dtype) -> counting.Counts:
    with emulated.accelerator() as policy:
        emulated.move(model)
        batch = entry.batch_on(model, emulated.NAME)

        def forward() -> torch.Tensor:
            with torch.autocast(emulated.NAME, dtype=dtype):
                return loss_of(model(**batch))

        return counting.count(forward, model, policy, batch)


def table(rows: Sequence[Row]) -> str:
    """A line for each model, in Markdown: stock in GiB, the others as ratios to it."""
    lines: list[str] = []
    for mode in dict.fromkeys(row.case["mode"] for row in rows):
        cases: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row.case["mode"] == mode and not (row.reason and row.contender == STOCK.name):
                cases.setdefault(row.title, {})[row.contender] = row
        lines += ["", *_table(str(mode), list(cases.values()))]
    absent = {(r.case["model"], r.contender, r.reason) for r in rows if r.reason}
    whole = {(c, reason) for _, c, reason in absent if "GPU" in str(reason)}
    lines += ["", *(f"not counted: {c}: {reason}" for c, reason in sorted(whole))]
    lines += [
        f"not counted: {model}, {c}: {reason}"
        for model, c, reason in sorted(absent)
        if (c, reason) not in whole
    ]
    return "\n".join(lines)


def _table(mode: str, cases: list[dict[str, Row]]) -> list[str]:
    dtypes = {str(case[STOCK.name].case["autocast"]) for case in cases}
    others = dict.fromkeys(c for case in cases for c, row in case.items() if not row.reason)
    others.pop(STOCK.name)
    header = (
        [mode, "batch"] + ["autocast"] * (len(dtypes) > 1) + ["norms lowered"] * (mode == "eager")
    )
    last = ("peak", "least_ms") if mode == "eager" else ("kernels",)
    for what in ("kept", "moved", *last):
        header += [UNITS.get(what, f"{what} GiB"), *others]
    lines = [header, ["---"] * len(header)]
    for case in cases:
        stock = case[STOCK.name]
        about = stock.case
        shallow = f" ({about['of']})" if "of" in about else ""
        line = [f"{about['model']}{shallow}", f"{about['batch']}"]
        line += [str(about["autocast"])] * (len(dtypes) > 1)
        if mode == "eager":
            native = case["native"].figures
            line.append(f"{native.get('lowered_calls', '-')} of {native.get('norm_calls', '-')}")
        for what in ("kept", "moved", *last):
            own = stock.figures[what]
            line.append(f"{own:.4g}" if what in UNITS else f"{own / GIB:.2f}")  # type: ignore[operator]
            line += [_ratio(case.get(other), what, own) for other in others]
        lines.append(line)
    return ["| " + " | ".join(line) + " |" for line in lines]


def _ratio(row: Row | None, what: str, own: Figure) -> str:
    if row is None or row.reason:
        return "-"
    value = row.figures[what]
    return f"{value}" if what == "kernels" else f"{value / own:.3f}"  # type: ignore[operator]
