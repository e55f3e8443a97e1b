"""`lpln run COMMAND`: set the variables, open a route that works on every torch, run COMMAND."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lpln_autopatch._precision import Precision

_USAGE = "[--precision P] [--backend B] [--norms N] [--exempt E] [--summary] COMMAND ..."
_HERE = Path(__file__).resolve().parent
SITE = next(
    folder
    for folder in (_HERE / "sitecustomize", _HERE.parent / "sitecustomize_example")
    if (folder / "sitecustomize.py").is_file()
)
"""The folder of our sitecustomize: inside a built package, beside the package in a checkout."""

# On Windows, Python's os.exec returns to the shell before the command ends.
_CAN_EXEC = os.name != "nt"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        see = "" if message.endswith(".") else ". See --help."
        self.exit(2, f"{self.prog}: {message}{see}\n")


def main(arguments: Sequence[str], program: str) -> int:
    """Check the names, then replace this process by the command.

    Args:
        arguments: The words after `run`.
        program: The words before `run`, for messages.

    Returns:
        The exit status of the command, on Windows. Elsewhere it does not return.

    Raises:
        SystemExit: 2 for a wrong name or option, 127 for a command that is not found, 126 for one
            that does not start. The message is one line, and nothing was started.
    """
    parser = _parser(f"{program} run")
    ours, command = _split(arguments)
    options = parser.parse_args(ours)
    if not command:
        parser.error("no command to run")
    environment, words = _environment(options), _words(command)
    try:
        _check(environment, given=options.precision is not None)
        if _ignores_our_route(words) and not _torch_loads_entry_points(environment):
            raise ValueError(
                f"{words[0]} is told to ignore PYTHONPATH, and torch loads no entry points here: "
                "LPLN_PRECISION would not be read."
            )
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    found = shutil.which(words[0])
    if found is None:
        parser.exit(127, f"{parser.prog}: {words[0]!r} is not found on PATH.\n")
    try:
        if not _CAN_EXEC:
            return subprocess.run([found, *words[1:]], env=environment).returncode
        sys.stdout.flush()
        os.execve(found, words, environment)
    except OSError as error:
        parser.exit(126, f"{parser.prog}: {found} does not start: {error.strerror}.\n")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage=f"{program} {_USAGE}",
        description="Run COMMAND with norms in the autocast dtype, also where torch loads no entry "
        "points: before torch 2.5, and with TORCH_DEVICE_BACKEND_AUTOLOAD=0. This Python runs -m, "
        "-c and files that end in .py. Other commands, such as torchrun, are looked for on PATH.",
        epilog="An option that is not given leaves its variable as it is.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--precision", help="LPLN_PRECISION; if neither is given: amp", metavar="P")
    add("--backend", help="LPLN_BACKEND: native, fused, lean, apex, apex_lean, ...", metavar="B")
    add("--norms", help="LPLN_NORMS: layer_norm, group_norm, rms_norm, ..., all", metavar="N")
    add("--exempt", help="LPLN_EXEMPT: modules that stay stock, by the end of name", metavar="E")
    add("--summary", action="store_true", help="LPLN_SUMMARY=1: a line at exit counts the calls")
    return parser


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return our options, and the command that follows them, perhaps after `--`.

    argparse alone would take the command's `-m` for one of our options.
    """
    at = 0
    while at < len(arguments) and re.match("--.|-h$", word := arguments[at]):
        has_value = "=" in word or word in ("--summary", "--help", "-h")
        at += 1 if has_value else 2
    ours, command = arguments[:at], arguments[at:]
    return ours, command[1:] if command[:1] == ["--"] else command


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Return the environment in which the command runs."""
    environment = dict(os.environ)
    environment["LPLN_PRECISION"] = options.precision or environment.get("LPLN_PRECISION") or "amp"
    for name in ("backend", "norms", "exempt"):
        if (value := getattr(options, name)) is not None:
            environment[f"LPLN_{name.upper()}"] = value
    if options.summary:
        environment["LPLN_SUMMARY"] = "1"
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = str(SITE) + (os.pathsep + path if path else "")
    return environment


def _check(environment: dict[str, str], given: bool) -> None:
    """Check the names of precision, backend and norms in `environment`.

    Raises:
        ValueError: a name is not valid.
        ImportError: the backend cannot be used here.
    """
    from lpln_autopatch import _autoload

    precision, source = environment["LPLN_PRECISION"], "--precision" if given else "LPLN_PRECISION"
    if not _autoload.asks(precision):
        return
    Precision.parse(precision, source)
    names = {name: environment.get(name, "") for name in ("LPLN_BACKEND", "LPLN_NORMS")}
    if not any(names.values()):
        return  # torch takes seconds to import
    # The command is to be lowered, and not this process.
    os.environ.update(names, LPLN_PRECISION="off")

    from lpln_autopatch._request import Request

    Request.parse(precision, "auto", None, "environment")


def _words(command: Sequence[str]) -> list[str]:
    """Return the command, with this Python in front of a script, `-m` or `-c`."""
    first = command[0]
    if not (first.endswith(".py") or first in ("-m", "-c")):
        return list(command)
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, *command]


def _ignores_our_route(words: Sequence[str]) -> bool:
    """Return True if the command is a Python that ignores PYTHONPATH or sitecustomize."""
    if not re.match(r"python[\d.]*(\.exe)?$", Path(words[0]).name):
        return False
    options = iter(words[1:])
    for option in options:
        if not option.startswith("-") or option.startswith(("-m", "-c", "--")):
            return False
        if option in ("-W", "-X"):
            next(options, None)  # the value of the option
        elif not option.startswith(("-W", "-X")) and set(option) & set("IES"):
            return True
    return False


def _torch_loads_entry_points(environment: dict[str, str]) -> bool:
    import importlib_metadata

    if environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        return False
    version = importlib_metadata.version("torch")
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (2, 5)
