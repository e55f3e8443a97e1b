"""Tables of a report and a status: as text, in a notebook, and in a note below an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lpln_autopatch._recorder import Recorder, Row

Table = Sequence[Sequence[str]]
"""Rows of cells."""


def text(table: Table) -> str:
    """Return the table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def html(table: Table, has_head: bool, below: str = "") -> str:
    """Return the table for a notebook, then a line for each line of `below`."""
    lines = ["<table>"]
    for number, row in enumerate(table):
        tag = "th" if has_head and number == 0 else "td"
        cells = "".join(f'<{tag} style="text-align: left">{escape(c)}</{tag}>' for c in row)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>", *(f"<div>{escape(b)}</div>" for b in below.splitlines())])


def of_report(rows: Sequence[Row], training: bool | None) -> tuple[Table, str]:
    """Return the table of a report, and the sentences below it."""
    if training is None:
        listed = [(row.name or "(the model)", row.norm, row.reason) for row in rows]
        ran = "Nothing was run. Only running tells what is lowered: report(model, *inputs)"
        return [("name", "norm", "reason"), *listed], ran
    mode = "training" if training else "evaluation"
    below = f"The model ran in {mode} mode, and is left in it.\n"
    return of_rows(rows), below + _count(rows)


def of_rows(rows: Sequence[Row]) -> list[Sequence[str]]:
    """Return a table of norm calls with a head."""
    table: list[Sequence[str]] = [("name", "norm", "calls", "input", "output", "lowered", "reason")]
    for row in rows:
        dtypes = (row.input_dtype, row.output_dtype)
        given, got = (str(d).removeprefix("torch.") if d else "-" for d in dtypes)
        lowered, name = "yes" if row.lowered else "no", row.name or "(the model)"
        table.append((name, row.norm, str(row.calls), given, got, lowered, row.reason))
    return table


def _count(rows: Sequence[Row]) -> str:
    lowered = sum(row.calls for row in rows if row.lowered)
    return f"{lowered} of {sum(row.calls for row in rows)} norm calls are lowered"


@contextlib.contextmanager
def failure_noted(calls: Recorder) -> Iterator[None]:
    """Add a note to an error raised inside: the norm calls until then, and the module to exempt."""
    try:
        yield
    except Exception as error:
        # As `error.add_note` of Python 3.11 does. Tracebacks show it from there on.
        vars(error).setdefault("__notes__", []).append(f"lpln_autopatch: {_failure(calls)}")
        raise


def _failure(calls: Recorder) -> str:
    if not calls.rows:
        return "no norm had returned when this was raised."
    last, rows = calls.rows[-1], calls.counted()
    name, gave = last.name or "(the model)", str(last.output_dtype).removeprefix("torch.")
    sentence = f"The last norm that returned is {name}, in {gave}."
    if last.lowered:
        sentence += (
            f" If the failed code takes only float32, keep that norm stock: {_exempt(last)}."
        )
    return f"the norm calls until then:\n{text(of_rows(rows))}\n{_count(rows)}. {sentence}"


def _exempt(row: Row) -> str:
    if not row.name:
        return "exempt(model)"
    return f"exempt(model.get_submodule({row.name!r})), or LPLN_EXEMPT={row.name}"
