"""`python -m lpln_autopatch bench`: its options, the suites, and their output."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from importlib_metadata import PackageNotFoundError, version

from lpln_autopatch import disable, status
from lpln_autopatch._request import parse_norms
from lpln_autopatch._torch_compat import CAN_COUNT
from lpln_autopatch.bench import results
from lpln_autopatch.bench.batches import MAKE_BATCH
from lpln_autopatch.bench.timing import Progress

SUITES = {
    # First: its device has to be there before the first backward.
    "count": "what a training step of real models does under CUDA's autocast, without a GPU",
    "step": "a training step of the same models: time and memory on a GPU",
    "call": "one call, on one thread: what a call costs, and its error",
    "loss": "what a small language model learns, stock and lowered",
}
QUICK = "--quick shows that it runs. Its figures mean nothing."


def main(argv: Sequence[str]) -> int:
    """Run the suites that `argv` names, print their tables, and write the files that it names.

    An error before the first measurement ends the process with one line and a status of 1 or 2.
    """
    options = parse(argv)
    refuse_without_extra(options)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    about = environment(options.device, argv)
    above = "\n".join(f"{name:8} {value}" for name, value in about.items())
    above += f"\n{QUICK}" * options.quick
    measured: dict[str, list[results.Row]] = {}
    # Each suite is shown and written when it ends, so that an interrupt of the next one loses less.
    for suite in options.suites:
        module = import_module(f"lpln_autopatch.bench.{suite}")
        with contextlib.closing(Progress(suite)) as progress:
            measured[suite] = module.run(options, progress)
        rows, own = measured[suite], getattr(module, "table", None)
        table = results.table(rows) if own is None else own(rows, options)
        print(f"{above}\n{suite}: {SUITES[suite]}\n\n{module.LEGEND}\n\n{table}", flush=True)
        above = ""
        if options.json:
            results.write_json(options.json, about, measured)
        if options.plot:
            heading = f"{about['date']}, {about['device']}, {about['versions']}\n{about['command']}"
            results.plot(options.plot, f"{QUICK}\n" * options.quick + heading, measured)
    disable()
    return 0


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. It takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what is valid)\n")


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser's type for numbers from `least` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return int(text)

    return number


def parse(argv: Sequence[str]) -> Namespace:
    """Return the options, with the suites in order; None where a suite has its own default."""
    parser = Parser(
        prog="python -m lpln_autopatch bench",
        description="Measure norms, stock and lowered.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"{', '.join(SUITES)} (default: all; step on a GPU)",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"cpu, cuda, cuda:1, ... (default here: {device})")
    add("--quick", action="store_true", help="small sizes: does it run? its figures mean nothing")
    dtypes = ["bfloat16", "float16"]
    add("--dtype", nargs="+", choices=dtypes, dest="dtypes", help="what autocast runs in")
    add("--json", type=Path, metavar="FILE", help="write every figure")
    add("--plot", type=Path, metavar="FILE", help="draw them, a PNG")
    suites_of: dict[str, list[str]] = {}

    def add_for(suites: str, name: str, help: str, **how: Any) -> None:
        add(f"--{name}", help=f"{suites}: {help}", **how)
        suites_of[name] = suites.split(", ")

    add_for("count, step", "models", "see below", nargs="+", metavar="MODEL")
    modes = ["eager", "compiled"]
    add_for("count, step", "modes", "default: eager", nargs="+", choices=modes)
    add_for("count, step", "norms", "layer_norm, all, ...; default: by the model")
    add_for("count, step", "batches", "so many of each model's batches at once", type=at_least(1))
    add_for("count", "all-columns", "fused, the recipe, a bound of time", action="store_true")
    add_for("step, call", "rounds", "rounds of timing, at least 2", type=at_least(2))
    add_for("loss", "steps", "steps of training, at least 20", type=at_least(20))
    add_for("loss", "seeds", "how many, at least 2", type=at_least(2))
    tasks = ["text", "digits", "llama", "olmo2"]
    add_for("loss", "tasks", "only these", nargs="+", choices=tasks)
    add_for("loss", "lr", "learning rate (default: 0.001, under --policy 0.002)", type=float)
    add_for("loss", "exempt", "modules that stay stock", nargs="+", metavar="NAME")
    add_for("loss", "policy", "under CUDA's autocast lists, on the CPU", choices=["cuda"])
    options = parser.parse_args(argv)
    _refuse_suites(parser, options, suites_of)
    _refuse_files(parser, options)
    options.dtypes = [getattr(torch, name) for name in options.dtypes or ()]
    options.device = usable_device(options.device)
    return options


def _epilog() -> str:
    suites = (f"  {name:8} {what}" for name, what in SUITES.items())
    zoo: Any = import_module("lpln_autopatch.bench.zoo")
    names = f"{', '.join(zoo.MODELS)} (the default); {', '.join(zoo.MORE)}; all of them: all; "
    names += "timm:NAME, transformers:CONFIG, or MODULE:FUNCTION, which gives a model that has "
    models = textwrap.wrap(names + MAKE_BATCH, 76, break_on_hyphens=False)
    return "\n".join(["suites:", *suites, "models:", *(f"  {line}" for line in models)])


def _refuse_suites(parser: Parser, options: Namespace, suites_of: dict[str, list[str]]) -> None:
    """Put the suites in their order, unless one is wrong, or an option is for another one."""
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"{name!r} is not a suite; valid: {', '.join(SUITES)}")
    if "count" in options.suites and not CAN_COUNT:
        parser.error(f"count needs torch 2.13 or later, this is {torch.__version__}")
    # Full-size models would take a CPU hours.
    runs = {"count": CAN_COUNT, "step": not options.device.startswith("cpu")}
    chosen = options.suites or [name for name in SUITES if runs.get(name, True)]
    options.suites = [name for name in SUITES if name in chosen]
    if options.policy and not (
        CAN_COUNT and options.device == "cpu" and options.suites == ["loss"]
    ):
        parser.error("--policy is for loss alone, --device cpu, and torch 2.13 or later")
    try:
        parse_norms(options.norms or "all")
    except ValueError as error:
        parser.error(str(error))
    for option, its in suites_of.items():
        if getattr(options, option.replace("-", "_")) and not set(its) & set(options.suites):
            given = " and ".join(options.suites)
            parser.error(f"--{option} is for {' and '.join(its)}, not for {given}")


def _refuse_files(parser: Parser, options: Namespace) -> None:
    """Refuse a file that cannot be written, before anything is measured."""
    for file in filter(None, (options.json, options.plot)):
        if not file.absolute().parent.is_dir():
            parser.error(f"{file}: there is no such folder")
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            parser.error(f"{file}: it cannot be written")
    if options.json and options.plot and options.json.absolute() == options.plot.absolute():
        parser.error(f"{options.json}: --json and --plot need a file each")
    if options.plot and options.plot.suffix.lower() != ".png":
        parser.error(f"--plot {options.plot}: the name ends in .png")


def usable_device(name: str) -> torch.device:
    """Return the device of that name. If there is none, or LayerNorm is patched, exit."""
    try:
        device = torch.empty(0, device=name).device  # with its index
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")
    if status().installed:
        sys.exit("LPLN_PRECISION is set: unset it, the benchmark turns low precision on itself.")
    if os.environ.get("LPLN_BACKEND"):
        sys.exit("LPLN_BACKEND is set: unset it, the benchmark chooses the backends itself.")
    return device


def refuse_without_extra(options: Namespace) -> None:
    """Exit with one line if a package of the extra is missing that the run would need."""
    needed = ["tqdm", "tabulate"]
    needed += ["matplotlib"] * bool(options.plot) + ["sklearn"] * bool(options.policy)
    missing = [name for name in needed if find_spec(name) is None]
    message = f"not installed: {', '.join(missing)}. pip install 'lpln_autopatch[bench]'"
    # For count a missing package is status 2, like a missing model.
    if missing and "count" in options.suites:
        print(message, file=sys.stderr)
        sys.exit(2)
    if missing:
        sys.exit(message)


def environment(device: torch.device, argv: Sequence[str]) -> dict[str, object]:
    """Return the command, the date, the hardware and the versions of the figures."""
    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    versions = dict(status().versions)
    for name in ("transformers", "timm", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": shlex.join(["python", "-m", "lpln_autopatch", "bench", *argv]),
        "date": datetime.date.today().isoformat(),
        "device": f"{device} ({hardware})",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
