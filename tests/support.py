"""What several test files need."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lpln_autopatch.torch_compat import TORCH_VERSION

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

# Options with which Inductor generates no C++ and compiles in seconds: for tests of which code is
# compiled, kept and found again, not of what Inductor makes of it.
NO_CPP = {"fallback_by_default": True} if TORCH_VERSION >= (2, 11) else {}

AUTOCAST_DTYPES = [torch.bfloat16, torch.float16]
if TORCH_VERSION < (2, 4):
    AUTOCAST_DTYPES.remove(torch.float16)  # autocast on CPU refuses it there


def autocast(dtype: torch.dtype = torch.bfloat16, **options: object) -> torch.autocast:
    """Autocast on the CPU."""
    return torch.autocast("cpu", dtype=dtype, **options)


def output_dtype(
    module: torch.nn.Module, x: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> torch.dtype:
    """The dtype that `module` gives for x (float32, 4x8) under CPU autocast to `dtype`."""
    with autocast(dtype):
        return module(torch.randn(4, 8) if x is None else x).dtype


@contextlib.contextmanager
def layer_norm_dtypes(model: torch.nn.Module) -> Iterator[list[str]]:
    """What the LayerNorms of `model` give inside the block, call by call."""
    dtypes: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: dtypes.append(str(out.dtype)))
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
    ]
    yield dtypes
    for hook in hooks:
        hook.remove()


def digest(model: torch.nn.Module) -> str:
    """The parameters of `model`, to the bit."""
    total = hashlib.sha256()
    for parameter in model.parameters():
        total.update(bytes(parameter.detach().flatten().view(torch.uint8).tolist()))
    return total.hexdigest()


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
    ours = ("LPLN_", "AUTOWRAPT", "TRITON_INTERPRET")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
    )
    if check and result.returncode != 0:
        pytest.fail(f"exit {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result
