"""The Makefile, without running what it installs."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from support import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make; CI has it")


def make(*arguments: str) -> str:
    """Return the output of make, run in the folder of the checkout."""
    result = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bare_make_lists_every_target_and_installs_nothing():
    """Each with what it installs."""
    (targets,) = re.findall(r"^\.PHONY: help (.*)$", (ROOT / "Makefile").read_text(), re.M)
    printed = make()
    for target in targets.split():
        assert re.search(rf"^make {target} ", printed, re.M)
    assert "pip" not in make("--dry-run")


def test_environment_whose_creation_was_interrupted_is_made_anew(tmp_path):
    """A half-made environment is removed; a finished one stays."""
    (tmp_path / "bin").mkdir()
    steps = make("--dry-run", "test", f"VENV={tmp_path}")
    assert f"rm -rf {tmp_path}\n" in steps
    assert f"-m venv {tmp_path}\n" in steps
    (tmp_path / "has-torch").touch()
    steps = make("--dry-run", "test", f"VENV={tmp_path}")
    assert f"rm -rf {tmp_path}\n" not in steps
    assert "-m venv" not in steps


def test_demo_and_test_share_an_environment(tmp_path):
    """An environment that `make demo` has made serves `make test`, which adds to it."""
    demo, test = (make("--dry-run", target, f"VENV={tmp_path}") for target in ("demo", "test"))
    installed = [line for line in demo.splitlines() if "pip install" in line]
    assert len(installed) == 4
    # The last, transformers, is among what `make test` installs with the extra.
    assert [line for line in test.splitlines() if line in installed] == installed[:3]
