"""Helpers of several test files."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

from lpln_autopatch import _norms
from lpln_autopatch._torch_compat import (
    CHECKPOINT_ENTRIES,
    CHECKPOINT_RECOMPUTATIONS,
    TORCH_VERSION,
)

ROOT = Path(__file__).resolve().parent.parent

# The variables of the one route of zero code that works on every torch.
A_ROUTE = {
    "PYTHONPATH": str(ROOT / "sitecustomize_example"),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
}

needs_dynamo = pytest.mark.skipif(
    TORCH_VERSION < (2, 5),
    reason="before torch 2.5 Dynamo does not trace LayerNorm.forward; CI runs this on later ones",
)


def run_elsewhere(condition: bool, where: str) -> pytest.MarkDecorator:
    """Leave a test out if `condition` holds, and name `where` it runs in the last line.

    For what another target of the Makefile, or a GPU, has to run. A test that this version of torch
    cannot run is skipped.
    """
    return pytest.mark.elsewhere(condition, where)


def needs_library(*names: str) -> pytest.MarkDecorator:
    """Leave a test out where a library is missing; under `make test-frameworks`, never."""
    missing = ", ".join(name for name in names if importlib.util.find_spec(name) is None)
    if missing and os.environ.get("LPLN_TEST_FRAMEWORKS"):
        raise ImportError(f"LPLN_TEST_FRAMEWORKS is set, and {missing} is not installed")
    return run_elsewhere(bool(missing), "make test-frameworks")


needs_gpu = run_elsewhere(not torch.cuda.is_available(), "a CUDA GPU")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton's kernels run: without a GPU in its interpreter."""

runs_kernels = run_elsewhere(
    importlib.util.find_spec("triton") is None or TORCH_VERSION < (2, 6),
    "make test with torch 2.6 or later on Linux, where Triton is",
)

# Options with which Inductor generates no C++ and compiles in seconds: for tests of which code is
# compiled, kept and found again, not of what Inductor makes of it.
NO_CPP = {"fallback_by_default": True} if TORCH_VERSION >= (2, 11) else {}

# A module of models for `bench`: four rows of eight, through a matrix, a LayerNorm and a column.
SMALL_MODELS = """
import types, torch

class Small(torch.nn.Sequential):
    def forward(self, x):
        return types.SimpleNamespace(loss=super().forward(x).sum())

    def make_batch(self, items, length, device):
        return {"x": torch.randn(4, 8, device=device)}

def make():
    return Small(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))

def fails():
    return torch.nn.Linear(8, 8)

class Unfed(Small):
    def make_batch(self, items, length, device):
        return {"x": self.missing}

def unfed():
    return Unfed(torch.nn.LayerNorm(8))

class Configured(torch.nn.Linear):
    config = types.SimpleNamespace()

def configured():
    return Configured(8, 8)

def needs():
    import no_such_dependency

def bare():
    return Small(torch.nn.Linear(8, 8))

def nothing():
    return None

def broken():
    raise ModuleNotFoundError("Could not import module 'Broken'. Why, who knows.")
"""

AUTOCAST_DTYPES = [torch.bfloat16, torch.float16]
if TORCH_VERSION < (2, 4):
    AUTOCAST_DTYPES.remove(torch.float16)  # autocast on CPU refuses it there


def autocast(dtype: torch.dtype = torch.bfloat16, **options: object) -> torch.autocast:
    """Return autocast on the CPU."""
    return torch.autocast("cpu", dtype=dtype, **options)


class UnderAutocast(torch.nn.Module):
    """A model that enters autocast itself: a part of what is exported."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with autocast(self.dtype):
            return self.model(x)


def output_dtype(
    module: torch.nn.Module, x: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> torch.dtype:
    """Return the dtype that `module` gives for x (float32, 4x8) under CPU autocast to `dtype`."""
    with autocast(dtype):
        return module(torch.randn(4, 8) if x is None else x).dtype


@contextlib.contextmanager
def layer_norm_dtypes(model: torch.nn.Module) -> Iterator[list[str]]:
    """Collect the output dtypes of the LayerNorms of `model` inside the block, call by call."""
    dtypes: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: dtypes.append(str(out.dtype)))
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
    ]
    yield dtypes
    for hook in hooks:
        hook.remove()


def exchanged_functions() -> list[object]:
    """Return the functions that the package exchanges, as they are in PyTorch now."""
    named = [getattr(torch.nn.functional, name) for name in _norms.FUNCTIONS]
    paths = [path.split(".") for path in (*CHECKPOINT_ENTRIES, *CHECKPOINT_RECOMPUTATIONS)]
    checkpointing = [functools.reduce(getattr, path, torch.utils.checkpoint) for path in paths]
    return [*named, inspect.unwrap(torch.nn.LayerNorm.forward), *checkpointing]


def digest(model: torch.nn.Module) -> str:
    """Return a hash of the parameters of `model`, to the bit."""
    total = hashlib.sha256()
    for parameter in model.parameters():
        total.update(bytes(parameter.detach().flatten().view(torch.uint8).tolist()))
    return total.hexdigest()


def add_distribution(folder: Path, name: str, **backends: str) -> None:
    """Put a distribution into `folder` whose entry points bring `backends`."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{backend} = {value}\n" for backend, value in backends.items()]
    (info / "entry_points.txt").write_text("[lpln_autopatch.backends]\n" + "".join(lines))


def run_python(
    *arguments: str,
    check: bool = True,
    timeout: float = 300,
    cwd: object = ROOT / "tests",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with LPLN_* set only as `environment` says.

    Triton compiles there, and does not interpret.
    Not in the folder of the checkout, which `python -c` would import the package from.
    """
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**_inherited(), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
    )
    return _checked(result) if check else result


def run_forked(
    *arguments: str, check: bool = True, timeout: float = 300, cwd: object = ROOT / "tests"
) -> subprocess.CompletedProcess[str]:
    """Run Python as `run_python` does, in a fork of a process that has imported torch.

    Importing torch is most of what a small process costs. Where the environment, or the order of
    imports, is part of the claim, only `run_python` proves it.
    """
    if not hasattr(os, "fork"):
        return run_python(*arguments, check=check, timeout=timeout, cwd=cwd)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        task = [arguments, str(cwd), int(timeout), *map(str, files)]
        forks = _forks()
        print(json.dumps(task), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        printed = [file.read_text() for file in files]
    result = subprocess.CompletedProcess(arguments, status, *printed)
    return _checked(result) if check else result


# Reads a task a line, and prints the exit status of the fork that has run it. The fork leaves the
# loop, so that it ends as every interpreter does.
FORKS = """
import json, os, runpy, signal, sys, types
import torch

for line in sys.stdin:
    if (pid := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
(kind, *sys.argv), folder, timeout, *files = json.loads(line)
signal.alarm(timeout)
os.chdir(folder)
for descriptor, file in enumerate([os.devnull, *files]):
    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
if kind == "-c":
    code, sys.argv[0], sys.path[0] = sys.argv[0], "-c", ""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(main))
elif kind == "-m":
    sys.path[0] = folder
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, kind)
    sys.path[0] = os.path.dirname(kind)
    runpy.run_path(kind, run_name="__main__")
"""


@functools.cache
def _forks() -> subprocess.Popen[str]:
    """Return the process that forks, one for each process that runs tests."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = {**_inherited(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", FORKS], env=environment, text=True, **pipes)
    atexit.register(process.communicate)
    return process


def _inherited() -> dict[str, str]:
    """Return the environment of the tests without our variables and Triton's TRITON_INTERPRET."""
    ours = ("LPLN_", "AUTOWRAPT", "TRITON_INTERPRET")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def _checked(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Return `result` without the lines that torch.distributed prints (torch 2.9)."""
    if result.returncode != 0:
        pytest.fail(f"exit {result.returncode}\n{result.stdout}\n{result.stderr}")
    result.stdout = re.sub(r"^\[Gloo\].*\n", "", result.stdout, flags=re.MULTILINE)
    return result
