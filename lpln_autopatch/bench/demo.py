"""The end of `make demo`: both trainings side by side, the counts, and a conclusion."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOSS, SAVED = "final loss (mean of the last tenth)", "saved for backward, MiB"
MEASURES = {"kept": "kept for backward, GiB", "moved": "moved, GiB", "peak": "peak, GiB"}

Summary = Mapping[str, str]
Counts = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By model, contender and measure."""


def main(folder: Path) -> int:
    """Print the figures that the trainings and the count have written into `folder`."""
    stock, lowered = (_summary(folder / f"{name}.tsv") for name in ("stock", "lowered"))
    counts = _counts(json.loads((folder / "count.json").read_text())["suites"]["count"])
    print("\n".join(["", *trainings(stock, lowered), "", *table(counts), ""]))
    print(textwrap.fill(conclusion(stock, lowered, counts), 100))
    return 0


def trainings(stock: Summary, lowered: Summary) -> list[str]:
    """Return a line for each figure of the small model's trainings, but none for speed.

    Speed differs by chance between two runs that follow each other.
    """
    rows = [("a small model, trained on this machine", "stock", "LPLN_PRECISION=amp")]
    rows += [(name, stock[name], lowered[name]) for name in stock if "per second" not in name]
    lines = [f"{name:39} {one:18} {other}" for name, one, other in rows]
    if stock[SAVED] == lowered[SAVED]:
        lines.append("On a CPU lowering keeps the float32 input for backward: no memory is saved.")
    return lines


def table(counts: Counts) -> list[str]:
    """Return a line for each model and measure: stock's bytes, and the others' shares of them."""
    contenders = list(dict.fromkeys(name for model in counts.values() for name in model))
    head = f"{'counted: a training step on a GPU':39}"
    lines = [head + "".join(f" {name:>9}" for name in contenders)]
    for model, of in counts.items():
        for measure, words in MEASURES.items():
            base = of["stock"][measure]
            cells = [f"{base / 2**30:9.2f}"]
            others = contenders[1:]
            cells += [f"{of[c][measure] / base:9.3f}" if c in of else f"{'-':>9}" for c in others]
            lines.append(f"{f'{model}: {words}':39} {' '.join(cells)}")
    return lines


def conclusion(stock: Summary, lowered: Summary, counts: Counts) -> str:
    """Return the conclusion from the figures, in two sentences."""
    one, other = float(stock[LOSS]), float(lowered[LOSS])
    shares = [
        f"{model} keeps {_less(of, 'kept')} and moves {_less(of, 'moved')}"
        for model, of in counts.items()
    ]
    return (
        f"Lowered, a training step on a GPU needs fewer bytes: {'; '.join(shares)} than stock. "
        f"The small model's losses, {one:.4f} stock and {other:.4f} lowered, differ by "
        f"{abs(other / one - 1):.2%}."
    )


def _less(of: Mapping[str, Mapping[str, float]], measure: str) -> str:
    return f"{1 - of['native'][measure] / of['stock'][measure]:.0%} less"


def _summary(file: Path) -> dict[str, str]:
    lines = (line.partition("\t") for line in file.read_text().splitlines())
    return {name: value for name, _, value in lines}


def _counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    counts: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["figures"]:
            counts.setdefault(row["case"]["model"], {})[row["contender"]] = row["figures"]
    return counts


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
