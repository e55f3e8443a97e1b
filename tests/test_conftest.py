"""The configuration of these tests: what pytest prints, and what it needs."""

from __future__ import annotations

from pathlib import Path

from support import ROOT, needs_dynamo, run_forked

FAILS = """
import torch

def test_fails():
    torch.compile(torch.sin, backend="eager")(torch.ones(1))
    raise ArithmeticError("on purpose")
"""


def run_pytest(*arguments: str) -> str:
    """Run pytest in a process of its own, with our configuration; return all that it prints."""
    ours = ("-c", str(ROOT / "pyproject.toml"), "-p", "conftest")
    result = run_forked("-m", "pytest", *ours, *arguments, check=False)
    return result.stdout + result.stderr


def test_tests_run_without_xdist(tmp_path: Path):
    """pytest collects and runs where pytest-xdist is missing."""
    file = tmp_path / "test_passes.py"
    file.write_text("def test_passes(): pass\n")
    printed = run_pytest("-p", "no:xdist", str(file))
    assert "1 passed" in printed, printed


@needs_dynamo
def test_failing_test_prints_no_trace_log(tmp_path: Path):
    """A failing test that compiles shows its error, and no empty lines of torch's trace log."""
    file = tmp_path / "test_fails.py"
    file.write_text(FAILS)
    printed = run_pytest(str(file))
    assert "ArithmeticError: on purpose" in printed
    assert "torch.__trace" not in printed
