"""`python -m lpln_autopatch bench`: how much faster, at what cost, on this machine.

python -m lpln_autopatch bench
python -m lpln_autopatch bench kernel call --device cuda --json figures.json --plot figures.png
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from importlib_metadata import PackageNotFoundError, version

from lpln_autopatch import disable, status
from lpln_autopatch.bench import results
from lpln_autopatch.bench.options import Options, Parser, at_least, usable_device
from lpln_autopatch.torch_compat import CAN_COUNT

SUITES = {
    # First: its device has to be there before the first backward.
    "count": "what a training step of real models does under CUDA's autocast, without a GPU",
    "kernel": "LayerNorm alone, on the device, against every rival",
    "call": "one call on the host, on one thread",
    "model": "a training step of BERT, GPT-2 and ViT",
    "loss": "what a language model learns, stock and lowered",
}
LEGEND = """/ stock, ...  time as a ratio, median (quartiles) of the rounds; below 1 is faster
error ...    relative, against float64
gives        the dtype of what LayerNorm returns"""
LEGEND_OF_COUNT = """ratios are to stock: below 1 is less; recipe is Composer's
kept         bytes from forward to backward; moved: read and written by all operators
least ms     a bound for an A100 from bytes and FLOPs, no measurement"""
# The options that are not for every suite.
SUITES_OF = {
    "rounds": ("kernel", "call", "model"),
    "graph": ("kernel",),
    "features": ("kernel",),
    "models": ("model", "count"),
    "modes": ("model", "count"),
    "norms": ("count",),
    "steps": ("loss",),
    "seeds": ("loss",),
    "lr": ("loss",),
}
QUICK = "--quick shows that it runs. Its figures mean nothing."
RIVALS = ("triton", "mosaicml", "apex", "liger-kernel", "timm", "quack-kernels", "transformers")


def main(argv: Sequence[str]) -> int:
    """Run the suites that `argv` names, print their tables, and write what it asks for.

    Returns:
        0. Whatever is wrong before anything has been measured ends the process instead, with one
        line and a status of 1 or 2.
    """
    options, suites = parse(argv)
    refuse_without_extra(options, suites)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    from tqdm import tqdm

    about = environment(options.device, argv)
    above = "\n".join(f"{name:8} {value}" for name, value in about.items())
    above += f"\n\n{LEGEND_OF_COUNT if suites == ['count'] else LEGEND}"
    above += f"\n{QUICK}" * options.quick + "\n"
    measured: dict[str, list[results.Row]] = {}
    # What is measured is shown and written at once: whoever interrupts the next suite keeps it.
    for suite in suites:
        module = import_module(f"lpln_autopatch.bench.{suite}")
        with tqdm(unit="round", leave=False, disable=None) as progress:
            measured[suite] = module.run(options, progress)
        table = getattr(module, "table", results.table)
        print(f"{above}\n{suite}: {SUITES[suite]}\n{table(measured[suite])}", flush=True)
        above = ""
        if options.json:
            results.write_json(options.json, about, measured)
    disable()
    if options.plot:
        heading = (
            f"{QUICK}\n" * options.quick
            + f"{about['date']}, {about['device']}, {about['versions']}\n{about['command']}"
        )
        results.plot(options.plot, heading, measured)
    return 0


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The options, and the suites in the order of `SUITES`."""
    parser = Parser(
        prog="python -m lpln_autopatch bench",
        description="Measure LayerNorm, stock and lowered, against every rival that is installed.",
        epilog="\n".join(["suites:", *(f"  {name:8} {what}" for name, what in SUITES.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "suites", nargs="*", metavar="SUITE", help="count, kernel, call, model, loss (default: all)"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"cpu, cuda, cuda:1, ... (default here: {device})")
    add("--quick", action="store_true", help="small sizes: does it run? its figures mean nothing")
    add("--dtype", nargs="+", choices=["bfloat16", "float16"], help="what autocast runs in")
    add("--rounds", type=at_least(2), help="rounds of timing, at least 2")
    add("--graph", action="store_true", help="kernel: time CUDA graphs, the device alone")
    add("--features", type=at_least(1), nargs="+", metavar="N", help="kernel: sizes of a row")
    add("--models", nargs="+", metavar="MODEL", help="model: bert, gpt2, vit; count: see the docs")
    add("--norms", help="count: layer_norm, all, ...; default: by the model")
    add(
        "--modes",
        nargs="+",
        choices=["eager", "compiled"],
        help="model: default both; count: eager",
    )
    add("--steps", type=at_least(20), help="loss: steps of training, at least 20")
    add("--seeds", type=at_least(2), help="loss: how many, at least 2")
    add("--policy", choices=["cuda"], help="loss: under CUDA's autocast lists, on the CPU")
    add("--lr", type=float, help="loss: learning rate (default: 0.001)")
    add("--json", type=Path, metavar="FILE", help="write every figure")
    add("--plot", type=Path, metavar="FILE", help="draw them, a PNG")
    args = parser.parse_args(argv)
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        parser.error(f"{unknown[0]!r} is not a suite; valid: {', '.join(SUITES)}")
    for file in (args.json, args.plot):
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"{file}: there is no such folder")
        if file is not None and (
            file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)
        ):
            parser.error(f"{file}: it cannot be written")
    if args.json and args.plot and args.json.absolute() == args.plot.absolute():
        parser.error(f"{args.json}: --json and --plot need a file each")
    if args.plot and args.plot.suffix.lower() != ".png":
        parser.error(f"--plot {args.plot}: the name ends in .png")
    if args.policy and not (CAN_COUNT and args.device == "cpu" and args.suites == ["loss"]):
        parser.error("--policy is for loss alone, --device cpu, and torch 2.13 or later")
    if args.graph and not args.device.startswith("cuda"):
        parser.error(f"--graph: only a CUDA device has graphs, not {args.device}")
    given = {k: v for k, v in vars(args).items() if k not in ("suites", "device", "dtype")}
    dtypes = [getattr(torch, name) for name in args.dtype] if args.dtype else None
    able = [name for name in SUITES if name != "count" or CAN_COUNT]
    suites = [name for name in SUITES if name in (args.suites or able)]
    if not {*suites} <= {*able}:
        parser.error(f"count needs torch 2.13 or later, this is {torch.__version__}")
    for option, those in SUITES_OF.items():
        if given[option] and not {*suites} & {*those}:
            parser.error(f"--{option} is for {' and '.join(those)}, not for {' and '.join(suites)}")
    if suites != ["count"] and not {*(args.models or ())} <= {"bert", "gpt2", "vit"}:
        parser.error("--models: other models than bert, gpt2 and vit are for count, named alone")
    return Options(usable_device(args.device), dtypes=dtypes, **given), suites


def refuse_without_extra(options: Options, suites: Sequence[str]) -> None:
    """Exit with one line if a package of the extra is missing that the run would need."""
    needed = ["tqdm"] + ["matplotlib"] * bool(options.plot) + ["transformers"] * ("model" in suites)
    needed += ["sklearn"] * bool(options.policy)
    missing = [name for name in needed if find_spec(name) is None]
    message = f"not installed: {', '.join(missing)}. pip install 'lpln_autopatch[bench]'"
    if missing and "count" in suites:  # whatever count lacks, a model or its library, is a 2
        print(message, file=sys.stderr)
        sys.exit(2)
    if missing:
        sys.exit(message)


def environment(device: torch.device, argv: Sequence[str]) -> dict[str, object]:
    """What the figures hold for: command, date, hardware, versions."""
    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    versions = dict(status().versions)
    for name in RIVALS:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": shlex.join(["python", "-m", "lpln_autopatch", "bench", *argv]),
        "date": datetime.date.today().isoformat(),
        "device": f"{device} ({hardware})",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
