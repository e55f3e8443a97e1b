"""Rows, the results of the suites: printed, written as JSON, and drawn."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """The median of several measurements, between the quartiles around it."""

    low: float
    median: float
    high: float


Figure = float | str | Quartiles
RATIOS = ("/ stock", "kept / stock", "moved / stock")
"""The figures that `plot` draws."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The figures of a contender in a case, or the reason why it has none."""

    case: Mapping[str, object]  # values by aspect, in the words of the table
    contender: str
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    reason: str | None = None  # of a contender without figures
    curves: Sequence[Sequence[float]] = ()  # to draw, each a figure a step

    @property
    def title(self) -> str:
        """The case, in a line."""
        return ", ".join(f"{aspect} {value}" for aspect, value in self.case.items())


def short(dtype: torch.dtype) -> str:
    """Return the name of `dtype` without "torch."."""
    return str(dtype).removeprefix("torch.")


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text: a table for each case, a line for each contender."""
    from tabulate import tabulate

    blocks: list[str] = []
    measured = (row for row in rows if row.reason is None)
    for title, group in itertools.groupby(measured, key=lambda row: row.title):
        block = list(group)
        # In the order of the fullest row: stock has no ratio to stock.
        fullest = sorted(block, key=lambda row: -len(row.figures))
        names = list(dict.fromkeys(name for row in fullest for name in row.figures))
        lines = [[r.contender, *(_text(r.figures.get(name, "")) for name in names)] for r in block]
        aligned = ["left", *["right"] * len(names)]
        text = tabulate(lines, ["", *names], "simple", colalign=aligned, disable_numparse=True)
        blocks.append(f"{title}\n{text}\n")
    return "\n".join([*blocks, *not_measured(rows)])


def not_measured(rows: Sequence[Row]) -> list[str]:
    """Return a line for each reason and each contender without figures.

    The line names the case if the contender has figures in another case.
    """
    measured = {row.contender for row in rows if row.reason is None}
    lines = [
        f"not measured: {row.contender}{f', {row.title}' * (row.contender in measured)}: "
        f"{row.reason}"
        for row in rows
        if row.reason is not None
    ]
    return list(dict.fromkeys(lines))


def _text(figure: Figure) -> str:
    if isinstance(figure, str):
        return figure
    if isinstance(figure, Quartiles):
        digits = 0 if figure.median >= 100 else 2
        low, median, high = (
            f"{each:,.{digits}f}" for each in (figure.low, figure.median, figure.high)
        )
        return f"{median} ({low} to {high})"
    return f"{figure:.4g}"


def write_json(file: Path, about: Mapping[str, object], suites: Mapping[str, list[Row]]) -> None:
    """Write the rows of all suites, with `about`, which names the hardware and the versions.

    A figure is a number, a word, or an object {"low", "median", "high"}.
    """
    file.write_text(
        json.dumps({**about, "suites": suites}, default=vars, separators=(",", ":")) + "\n"
    )


def plot(file: Path, heading: str, suites: Mapping[str, list[Row]]) -> None:
    """Draw every suite into one PNG: ratios to stock with quartiles, or each case's curves."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    every = [row for rows in suites.values() for row in rows if row.reason is None]
    # A contender has one colour in all panels; the first ten have the dark ones.
    names = list(dict.fromkeys(row.contender for row in every))
    colors = {name: colormaps["tab20"](2 * place % 19) for place, name in enumerate(names)}
    panels: dict[tuple[str, str], list[Row]] = {}
    for suite, rows in suites.items():
        for row in rows:
            shown = [r for r in RATIOS if r in row.figures and row.contender != "stock"]
            for what in [*shown, *["curves"] * bool(row.curves)]:
                title = f"{suite}: {row.title if what == 'curves' else what}"
                panels.setdefault((title, what), []).append(row)
    heights = [max(3.0, 1 + 0.25 * len({row.title for row in rows})) for rows in panels.values()]
    figure = Canvas(figsize=(12, sum(heights, 1.0)), layout="constrained")
    figure.suptitle(heading, fontsize="small")
    grid = figure.subplots(max(1, len(panels)), squeeze=False, height_ratios=heights or None)
    for ((title, what), rows), axes in zip(panels.items(), grid[:, 0], strict=False):
        axes.set_title(title)
        if what == "curves":
            _draw_curves(axes, rows, colors)
        else:
            _draw_ratios(axes, rows, what, colors)
    drawn = {row.contender for rows in panels.values() for row in rows}
    names = [name for name in names if name in drawn]
    handles = [Line2D([], [], color=colors[name], marker="o", label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(file, format="png")


def _draw_ratios(axes: Any, rows: Sequence[Row], name: str, colors: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    contenders = list(dict.fromkeys(row.contender for row in rows))
    # The case with the first contender's least ratio is on top.
    first = {r.title: _middle(r.figures[name]) for r in rows if r.contender == contenders[0]}
    titles = dict.fromkeys(row.title for row in rows)
    cases = sorted(titles, key=lambda title: first.get(title, math.inf))
    for row in rows:
        ratio: Any = row.figures[name]
        q = ratio if isinstance(ratio, Quartiles) else Quartiles(ratio, ratio, ratio)
        aside = 0.6 * ((contenders.index(row.contender) + 0.5) / len(contenders) - 0.5)
        around = [[q.median - q.low], [q.high - q.median]]
        y, color = cases.index(row.title) + aside, colors[row.contender]
        axes.errorbar(q.median, y, xerr=around, fmt="o", ms=4, color=color)
    axes.axvline(1, color="grey", linewidth=1)
    # Aspects that all cases share would only make the labels long.
    aspects = dict.fromkeys(aspect for row in rows for aspect in row.case)
    varied = [a for a in aspects if len({str(row.case.get(a)) for row in rows}) > 1] or list(
        aspects
    )
    if "model" in varied:  # each has a batch of its own
        varied = [aspect for aspect in varied if aspect not in ("batch", "norms", "of")]
    labels = {r.title: ", ".join(str(r.case[a]) for a in varied if a in r.case) for r in rows}
    axes.set_yticks(range(len(cases)), [labels[case] for case in cases], fontsize="small")
    axes.invert_yaxis()
    # On a logarithmic axis half and double are as far from 1.
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7, 8, 9)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("left of 1: less than stock")


def _middle(figure: Figure) -> float:
    return figure.median if isinstance(figure, Quartiles) else float(figure)


def _draw_curves(axes: Any, rows: Sequence[Row], colors: Mapping[str, Any]) -> None:
    for place, row in enumerate(rows):
        color = colors[row.contender]
        for curve in row.curves:
            axes.plot(curve, color=color, linewidth=0.5, alpha=0.25)
        mean = [sum(losses) / len(losses) for losses in zip(*row.curves, strict=True)]
        # The first lines are wider, so that all are seen where they agree.
        axes.plot(mean, color=color, linewidth=4 / (1 + place))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss: the mean, and thin a seed")
