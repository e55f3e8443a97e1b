"""`lpln run`: what becomes of commands that are started through it, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from support import run_python

from lpln_autopatch import _launcher
from lpln_autopatch._torch_compat import TORCH_VERSION

# Where torch loads no entry points.
CLOSED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

PROGRAM = """
import sys
import torch
with torch.autocast("cpu", dtype=torch.bfloat16):
    print(torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype, *sys.argv[1:])
sys.exit(7)
"""


@pytest.fixture
def program(tmp_path):
    """The path of a program that knows nothing of this package."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def lpln_run(*arguments, **options):
    """`lpln run` with these arguments; any exit status."""
    return run_python("-m", "lpln_autopatch", "run", *arguments, check=False, **options)


def test_script_is_run_where_torch_loads_no_entry_points(program):
    """A word ending in .py is run by this Python, lowered; what is behind it is the program's."""
    result = lpln_run("--norms=all", program, "--precision", "x", "-m", **CLOSED)
    assert (result.returncode, result.stdout) == (7, "torch.bfloat16 --precision x -m\n")
    assert "lpln_autopatch:" not in result.stderr  # torch 1.13 has a line about NumPy there


def test_module_and_python_are_run(program, tmp_path):
    """`-m` is run by this Python, and another word is found on PATH; `--` may stand before it."""
    for command in (["-m", "program"], ["--", sys.executable, program]):
        result = lpln_run("--precision", "bf16", *command, cwd=tmp_path, **CLOSED)
        assert (result.returncode, result.stdout) == (7, "torch.bfloat16\n")


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ([], {}, ["amp", None, None, None, None]),
        ([], {"LPLN_PRECISION": "bf16"}, ["bf16", None, None, None, None]),
        (["--precision=amp"], {"LPLN_PRECISION": "bf61"}, ["amp", None, None, None, None]),
        ([], {"LPLN_PRECISION": "", "LPLN_NORMS": "all"}, ["amp", None, "all", None, None]),
        ([], {"LPLN_PRECISION": "off"}, ["off", None, None, None, None]),
        (
            ["--backend", "native", "--norms=layer_norm", "--exempt", "a.b", "--summary"],
            {"LPLN_BACKEND": "x"},
            ["amp", "native", "layer_norm", "a.b", "1"],
        ),
    ],
)
def test_options_set_the_variables(options, environment, expected):
    """An option goes before its variable, and without either the precision is amp."""
    code = "import os; print([os.environ.get(f'LPLN_{n}') for n in {}])"
    names = ("PRECISION", "BACKEND", "NORMS", "EXEMPT", "SUMMARY")
    result = lpln_run(*options, "-c", code.replace("{}", repr(names)), **environment)
    assert result.stdout == f"{expected}\n", result.stderr


@pytest.mark.parametrize(
    ("options", "environment", "line"),
    [
        (["--precision", "bf61"], {}, "--precision='bf61' is not a precision. Valid: amp, "),
        (["--precision", "fp16"], {}, "--precision='fp16' lowers nothing: it is Composer's"),
        ([], {"LPLN_PRECISION": "bf61"}, "LPLN_PRECISION='bf61' is not a precision. Valid: amp, "),
        (["--backend", "leen"], {}, "LPLN_BACKEND='leen' is not a backend. Valid: auto, native, "),
        (["--norms", "x"], {}, "LPLN_NORMS='x': 'x' is not a norm. Valid: layer_norm, "),
        (["--backend", "apex"], {}, "LPLN_BACKEND='apex': NVIDIA apex is not installed"),
        (["--presicion", "amp"], {}, "unrecognized arguments: --presicion amp. See --help."),
        (["--summary=1"], {}, "argument --summary: ignored explicit argument '1'. See --help."),
    ],
)
def test_wrong_name_starts_nothing(program, options, environment, line):
    """One line says what is wrong, the exit status is 2, and the command was not started."""
    result = lpln_run(*options, program, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    (printed,) = result.stderr.splitlines()
    assert printed.startswith(f"python -m lpln_autopatch run: {line}")


def test_command_that_is_not_found_is_named(tmp_path):
    """A command that is not found is a line and status 127, or 126 if it does not start."""
    result = lpln_run("torchrn", "x")
    assert (result.returncode, result.stdout) == (127, "")
    assert result.stderr == "python -m lpln_autopatch run: 'torchrn' is not found on PATH.\n"
    (tmp_path / "command").write_bytes(b"\x7fELF, and nothing else")
    (tmp_path / "command").chmod(0o755)
    result = lpln_run(str(tmp_path / "command"))
    assert (result.returncode, result.stdout) == (126, "")
    assert "does not start: " in result.stderr
    assert lpln_run().stderr == "python -m lpln_autopatch run: no command to run. See --help.\n"


def test_isolated_python_is_refused_where_nothing_would_lower(program):
    """Python reads no PYTHONPATH under -I: torch's entry points must do it, or nothing is run."""
    for flags in (["-I"], ["-u", "-E"], ["-Wignore", "-sS"]):
        result = lpln_run(sys.executable, *flags, program, **CLOSED)
        assert (result.returncode, result.stdout) == (2, "")
        assert "is told to ignore PYTHONPATH" in result.stderr
    result = lpln_run(sys.executable, "-u", program, "-I", **CLOSED)
    assert result.stdout == "torch.bfloat16 -I\n"
    if TORCH_VERSION >= (2, 5):
        assert lpln_run(sys.executable, "-I", program).stdout == "torch.bfloat16\n"


def test_flags_of_this_python_are_passed_on():
    """The Python that runs a script has the flags of the one that runs us."""
    arguments = ["-O", "-m", "lpln_autopatch", "run", "-c", "import sys; print(sys.flags.optimize)"]
    assert run_python(*arguments).stdout == "1\n"


def test_sitecustomize_and_path_of_the_user_stay(tmp_path):
    """The user's sitecustomize runs, and PYTHONPATH is still searched."""
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    (tmp_path / "theirs.py").write_text("print('found')")
    code = f"import theirs; {PROGRAM}"
    result = lpln_run("-c", code, PYTHONPATH=str(tmp_path), **CLOSED)
    # The launcher is a Python, too.
    assert result.stdout.split() == ["theirs", "theirs", "found", "torch.bfloat16"]


def test_broken_installation_refuses_torch(tmp_path, program):
    """A program does not go on without our hook if that cannot act."""
    (tmp_path / "wrapt.py").write_text("raise ImportError('no wrapt here')")
    result = lpln_run(program, PYTHONPATH=str(tmp_path), **CLOSED)
    assert (result.returncode, result.stdout) == (1, "")
    assert "wrapt cannot be imported" in result.stderr


def test_all_routes_activate_once():
    """The launcher, the entry point and autowrapt: one activation."""
    code = """
import logging
logging.basicConfig(level="INFO", format="%(name)s %(levelname)s")
import torch
"""
    result = lpln_run("--precision", "amp", "-c", code, AUTOWRAPT_BOOTSTRAP="lpln_autopatch")
    assert result.stderr.count("lpln_autopatch INFO") == 1


def test_children_are_lowered(tmp_path):
    """A process that the command spawns is lowered, too."""
    script = tmp_path / "children.py"
    script.write_text(
        """
import torch
def dtype(_):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype)
if __name__ == "__main__":
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(dtype, [None]))
"""
    )
    assert lpln_run(str(script), **CLOSED).stdout == "torch.bfloat16\n"


def test_command_has_the_process_and_its_signals():
    """The command is the process that was started: a signal ends it, and is its exit status."""
    code = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    command = [sys.executable, "-m", "lpln_autopatch", "run", "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_without_exec_the_exit_status_is_that_of_the_command(monkeypatch):
    """The launcher waits for the command where there is no exec, as on Windows."""
    monkeypatch.setattr(_launcher, "_CAN_EXEC", False)
    assert _launcher.main(["-c", "raise SystemExit(5)"], "lpln") == 5


def test_help_lists_every_option(capsys):
    """`lpln run --help` and -h name the options and the variables."""
    for option in ("--help", "-h"):
        with pytest.raises(SystemExit, match="0"):
            _launcher.main([option], "lpln")
        shown = capsys.readouterr().out
        for name in ("precision", "backend", "norms", "exempt", "summary"):
            assert f"--{name}" in shown
            assert f"LPLN_{name.upper()}" in shown


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_value_that_torch_takes_for_no_is_one(program, value):
    """torch loads entry points only where its variable is 1: the launcher opens its own route."""
    result = lpln_run(program, TORCH_DEVICE_BACKEND_AUTOLOAD=value)
    assert (result.returncode, result.stdout) == (7, "torch.bfloat16\n")


@pytest.mark.parametrize(
    ("words", "ignores"),
    [
        ("python -X dev -E x.py", True),
        ("python3.11 -W ignore -I x.py", True),
        ("python -Wignore -BS x.py", True),
        ("python -X dev x.py -E", False),
        ("python -m module -I", False),
        ("torchrun -I", False),
    ],
)
def test_python_that_ignores_the_route_is_recognised(words, ignores):
    """`-I`, `-E` and `-S` count before the program, also behind an option with a value."""
    assert _launcher._ignores_our_route(words.split()) is ignores
