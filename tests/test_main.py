"""The command line: its words, its errors, and its exit status."""

from __future__ import annotations

import os
import sys
import types

import pytest
from support import run_python

import lpln_autopatch
from lpln_autopatch.__main__ import main


@pytest.mark.parametrize("arguments", [("treat",), ("--jsno",), ("--json", "bench"), ("--js",)])
def test_wrong_argument_is_one_line(arguments):
    """An unknown command or option: one line that says what there is, and exit status 2."""
    result = run_python("-m", "lpln_autopatch", *arguments, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"python -m lpln_autopatch: unrecognized arguments: {arguments[-1]}.")
    assert line.endswith("Valid: --json, run, bench, --version, --help.")


def test_bench_has_the_rest_of_the_line(monkeypatch):
    """`bench` gets every argument after it, `--json` and `--help` too, and its result is ours."""
    suites = types.SimpleNamespace(main=lambda arguments: 3 if arguments == ["--json", "-h"] else 0)
    monkeypatch.setitem(sys.modules, "lpln_autopatch.bench.suites", suites)
    assert main(["bench", "--json", "-h"]) == 3


def test_help_names_both_commands(capsys):
    """--help shows the doctor's option and the benchmark."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "python -m lpln_autopatch [--json]" in shown
    assert "python -m lpln_autopatch run [--help] ... COMMAND ..." in shown
    assert "python -m lpln_autopatch bench" in shown


def test_version_is_printed(capsys):
    """--version gives the version of the package."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lpln_autopatch {lpln_autopatch.__version__}\n"


def test_reader_that_has_enough_is_no_error(monkeypatch):
    """`| head`: no traceback, and the exit status is the doctor's."""
    monkeypatch.setattr("lpln_autopatch._doctor.diagnose", lambda: {"problem": None})
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["--json"]) == 0
        print("nobody reads this", flush=True)
