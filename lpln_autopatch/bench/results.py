"""What the suites give: rows, and how they are printed, written as JSON and drawn."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lpln_autopatch.bench.timing import Entry, Quartiles

Figure = float | str | Quartiles
OVER_STOCK = "/ stock"


@dataclasses.dataclass(frozen=True)
class Row:
    """What one contender did in one case, or why it has no figures.

    Attributes:
        case: What was measured, by aspect, in the words of the table.
        contender: The contender's name.
        figures: By name and unit; empty if there is a reason.
        reason: Why the contender was not measured, or None.
        curves: Lines to draw, each a figure a step.
    """

    case: Mapping[str, object]
    contender: str
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    curves: Sequence[Sequence[float]] = ()

    @property
    def title(self) -> str:
        """The case in a line."""
        return ", ".join(f"{aspect} {value}" for aspect, value in self.case.items())


def short(dtype: torch.dtype) -> str:
    """The name of `dtype` without "torch."."""
    return str(dtype).removeprefix("torch.")


def ratios(entry: Entry, entries: Sequence[Entry], rivals: Sequence[str]) -> dict[str, Figure]:
    """The times of `entry` over those of each of `rivals` that is among `entries`."""
    others = (other for other in entries if other.name in rivals and other.name != entry.name)
    return {f"/ {other.name}": entry.over(other) for other in others}


def table(rows: Sequence[Row]) -> str:
    """The rows as text: a block for each case, then the contenders that are nowhere in it."""
    lines: list[str] = []
    measured = [row for row in rows if row.reason is None]
    absent = {row.contender for row in rows} - {row.contender for row in measured}
    shown = [row for row in rows if row.contender not in absent]
    width = max([len(row.contender) for row in rows], default=0) + 2
    for title, group in itertools.groupby(shown, key=lambda row: row.title):
        block = list(group)
        # In the order of the fullest row: stock has no ratio to stock.
        fullest = sorted(block, key=lambda row: -len(row.figures))
        names = list(dict.fromkeys(name for row in fullest for name in row.figures))
        widths = {
            n: max(len(n), *(len(_text(row.figures.get(n, ""))) for row in block)) + 2
            for n in names
        }
        header = "".join(name.rjust(widths[name]) for name in names)
        lines += ["", title, f"  {'':{width}}{header}"]
        for row in block:
            cells = [_text(row.figures.get(name, "")).rjust(widths[name]) for name in names]
            text = "".join(cells) if row.reason is None else f"not measured: {row.reason}"
            lines.append(f"  {row.contender:{width}}{text}".rstrip())
    reasons = dict.fromkeys((r.contender, r.reason) for r in rows if r.contender in absent)
    if reasons:
        lines += ["", "not measured"]
        lines += [f"  {contender:{width}}{reason}" for contender, reason in reasons]
    return "\n".join(lines)


def _text(figure: Figure) -> str:
    if isinstance(figure, str):
        return figure
    if isinstance(figure, Quartiles):
        digits = 0 if figure.median >= 100 else 2
        low, median, high = (f"{each:,.{digits}f}" for each in figure)
        return f"{median} ({low} to {high})"
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"


def write_json(file: Path, about: Mapping[str, object], suites: Mapping[str, list[Row]]) -> None:
    """Write all that was measured, with what it was measured on.

    A figure is a number, a word, or an object {"low", "median", "high"}.
    """

    def plain(figure: Figure) -> object:
        return figure._asdict() if isinstance(figure, Quartiles) else figure

    content = {
        name: [
            {
                **vars(row),
                "figures": {key: plain(figure) for key, figure in row.figures.items()},
            }
            for row in rows
        ]
        for name, rows in suites.items()
    }
    file.write_text(json.dumps({**about, "suites": content}, indent=1) + "\n")


def plot(file: Path, heading: str, suites: Mapping[str, list[Row]]) -> None:
    """Draw every suite into one PNG: times over stock's with quartiles, or each case's curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    panels = [panel for name, rows in suites.items() for panel in _panels(name, rows)]
    heights = [max(3.0, 1 + 0.5 * len({row.title for row in rows})) for _, rows in panels]
    figure = Canvas(figsize=(12, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize="small")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for (name, rows), axes in zip(panels, grid[:, 0], strict=True):
        axes.set_title(name)
        if any(row.curves for row in rows):
            _draw_curves(axes, rows)
        elif any("kept / stock" in row.figures for row in rows):
            _draw_counts(axes, rows)
        else:
            _draw_ratios(axes, rows)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.savefig(file, format="png")


def _panels(name: str, rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """The suite as one panel; where it has curves, one for each case."""
    titles = dict.fromkeys(row.title for row in rows if row.curves)
    return [(f"{name}: {t}", [r for r in rows if r.title == t]) for t in titles] or [(name, rows)]


def _draw_ratios(axes: Any, rows: Sequence[Row]) -> None:
    constant, labels = _what_differs(rows)
    titles = list(dict.fromkeys(row.title for row in rows))
    contenders = list(dict.fromkeys(row.contender for row in rows if OVER_STOCK in row.figures))
    for index, contender in enumerate(contenders):
        aside = 0.7 * ((index + 0.5) / len(contenders) - 0.5)
        points = [
            (titles.index(row.title) + aside, ratio)
            for row in rows
            if row.contender == contender
            and isinstance(ratio := row.figures.get(OVER_STOCK), Quartiles)
        ]
        medians = [ratio.median for _, ratio in points]
        around = [[r.median - r.low for _, r in points], [r.high - r.median for _, r in points]]
        axes.errorbar(medians, [y for y, _ in points], xerr=around, fmt="o", ms=4, label=contender)
    axes.axvline(1, color="grey", linewidth=1)
    axes.hlines([i + 0.5 for i in range(len(titles) - 1)], 0, 1, "lightgrey", lw=0.7,
                transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(range(len(titles)), [labels[title] for title in titles], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"time / stock's: left is faster{constant and f' ({constant})'}")


def _draw_counts(axes: Any, rows: Sequence[Row]) -> None:
    counted = [row for row in rows if "kept / stock" in row.figures]
    titles = list(dict.fromkeys(row.title for row in counted))
    contenders = dict.fromkeys(row.contender for row in counted if row.contender != "stock")
    for what, marker in (("kept / stock", "o"), ("moved / stock", "x")):
        for color, contender in enumerate(contenders):
            own = [row for row in counted if row.contender == contender]
            places = [titles.index(row.title) for row in own]
            label = f"{contender}, {what}"
            shares = [row.figures[what] for row in own]
            # The first are larger: where two agree, both are seen.
            look = {"color": f"C{color}", "ms": 9 - 2.5 * color, "label": label}
            axes.plot(shares, places, marker, **look)
    axes.axvline(1, color="grey", linewidth=1)
    labels = {row.title: f"{row.case['model']}, {row.case['mode']}" for row in counted}
    axes.set_yticks(range(len(titles)), [labels[title] for title in titles], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("bytes / stock's: left is less")


def _what_differs(rows: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """What all cases share, in a line, and for each title what it alone has."""
    aspects = rows[0].case
    shared = {a for a in aspects if len({row.case.get(a) for row in rows}) == 1}
    constant = ", ".join(f"{a} {aspects[a]}" for a in aspects if a in shared)
    return constant, {
        row.title: ", ".join(f"{a} {value}" for a, value in row.case.items() if a not in shared)
        or row.title
        for row in rows
    }


def _draw_curves(axes: Any, rows: Sequence[Row]) -> None:
    for color, row in enumerate(row for row in rows if row.curves):
        for curve in row.curves:
            axes.plot(curve, color=f"C{color}", linewidth=0.5, alpha=0.25)
        mean = [sum(losses) / len(losses) for losses in zip(*row.curves, strict=True)]
        # The first are wider: where they agree, all are seen.
        width = 4 / (1 + color)
        axes.plot(mean, color=f"C{color}", linewidth=width, label=f"{row.contender}, mean")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, thin: a seed")
