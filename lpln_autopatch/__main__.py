"""The command line: the doctor, the launcher, and the benchmark."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from lpln_autopatch import __version__, _doctor, _launcher

_PROGRAM = "lpln" if Path(sys.argv[0]).stem == "lpln" else "python -m lpln_autopatch"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. Valid: --json, run, bench, --version, --help.\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments`, by default the process's, name; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:
        return _launcher.main(arguments[1:], _PROGRAM)
    if arguments[:1] == ["bench"]:
        if _PROGRAM == "lpln":  # `python -m` does so: models come from the working folder
            sys.path.insert(0, "")
        # No subcommand of argparse: the benchmark has its own parser and its own imports.
        return int(import_module("lpln_autopatch.bench.suites").main(arguments[1:]))
    parser = _Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [--json]\n       {_PROGRAM} run [--help] ... COMMAND ...\n"
        f"       {_PROGRAM} bench [--help] ...",
        description="Say which precision is active in a program that is started like this one, by "
        "which route it came, and which backends can be used here. The exit status is 1 if "
        "LPLN_PRECISION is set and does not lower LayerNorm. `run` starts a command with "
        "LPLN_PRECISION set, by a route that is always open. `bench` measures the gain of lowering "
        "on this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--version", action="version", version=f"lpln_autopatch {__version__}")
    options = parser.parse_args(arguments)
    # Imports, also of backends of other packages, may print: --json must stay JSON.
    with contextlib.redirect_stdout(sys.stderr):
        found = _doctor.diagnose()
    try:
        print(json.dumps(found, indent=2) if options.json else _doctor.text(found), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if found["problem"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
