"""What the command line asks of the suites."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from lpln_autopatch import status


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `python -m lpln_autopatch bench`, None where a suite has its own default.

    Attributes:
        device: Where everything runs.
        quick: Whether small sizes do, and figures that mean nothing.
        dtypes: Autocast dtypes.
        rounds: Rounds of timing.
        graph: Whether the kernel suite times replays of CUDA graphs.
        features: N, for the kernel suite.
        models: Names, for the model and count suites.
        modes: "eager", "compiled", for the model and count suites.
        norms: What is lowered, for the count suite.
        steps: Of training, for the loss suite.
        seeds: How many, for the loss suite.
        policy: "cuda" for CUDA's autocast lists on the CPU, for the loss suite.
        lr: Learning rate, for the loss suite.
        json: File for the rows.
        plot: File for the drawing.
    """

    device: torch.device
    quick: bool = False
    dtypes: list[torch.dtype] | None = None
    rounds: int | None = None
    graph: bool = False
    features: list[int] | None = None
    models: list[str] | None = None
    modes: list[str] | None = None
    norms: str | None = None
    steps: int | None = None
    seeds: int | None = None
    policy: str | None = None
    lr: float | None = None
    json: Path | None = None
    plot: Path | None = None

    def rounds_or(self, default: int) -> int:
        """The rounds that were asked for, or 2 for a quick run, or `default`."""
        return self.rounds or (2 if self.quick else default)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. It takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what is valid)\n")


def at_least(least: int) -> Callable[[str], int]:
    """A parser's type: a number from `least` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return int(text)

    return number


def usable_device(name: str) -> torch.device:
    """The device of that name. Exits with one line if there is none, or LayerNorm is patched."""
    try:
        torch.empty(0, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")
    if status().installed:
        sys.exit("LPLN_PRECISION is set: unset it, the benchmark turns low precision on itself.")
    if os.environ.get("LPLN_BACKEND"):
        sys.exit("LPLN_BACKEND is set: unset it, the benchmark measures every backend.")
    return torch.device(name)
