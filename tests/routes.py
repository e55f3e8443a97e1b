"""The routes of zero code, and a program that knows nothing of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT

from lpln_autopatch._torch_compat import TORCH_VERSION

SITECUSTOMIZE = str(ROOT / "sitecustomize_example")
HAS_AUTOLOAD = TORCH_VERSION >= (2, 5)
needs_autoload = pytest.mark.skipif(
    not HAS_AUTOLOAD, reason="torch >= 2.5 loads entry points; CI runs this there"
)

ROUTES = {
    "entry point": {},
    "sitecustomize": {"PYTHONPATH": SITECUSTOMIZE, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    "autowrapt": {"AUTOWRAPT_BOOTSTRAP": "lpln_autopatch", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    "all": {"PYTHONPATH": SITECUSTOMIZE, "AUTOWRAPT_BOOTSTRAP": "lpln_autopatch"},
}
if not HAS_AUTOLOAD:
    del ROUTES["entry point"]

PROGRAM = """
import torch
def dtype(_=None):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype)
if __name__ == "__main__":
    print(dtype())
"""


def write_program(folder: Path) -> str:
    """Write PROGRAM into `folder`; return its path."""
    path = folder / "program.py"
    path.write_text(PROGRAM)
    return str(path)
