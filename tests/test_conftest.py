"""The configuration of these tests: what pytest prints, and what it needs."""

from __future__ import annotations

from pathlib import Path

from support import ROOT, run_forked


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
