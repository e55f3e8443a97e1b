"""The files of a release, as `make dist` builds them: the same bytes every time, and a clean way in
and out of an environment that has torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from support import ROOT, run_elsewhere

import lpln_autopatch

DIST = Path(os.environ.get("LPLN_TEST_DIST", "")).resolve()
pytestmark = run_elsewhere("LPLN_TEST_DIST" not in os.environ, "make dist")
OUTPUT_DTYPE = """
import torch
with torch.autocast("cpu", dtype=torch.bfloat16):
    print(torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype)
"""


def build(folder: Path, *options: str) -> Path:
    """Build what `folder` holds, with `options`, and the folder of what was built."""
    out = folder.parent / f"{folder.name}-dist{''.join(options)}"
    command = [sys.executable, "-m", "build", "--outdir", str(out), *options, str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent)
    return out


def digest(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the checkout with other times and permissions."""
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "build", "dist")
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored, copy_function=shutil.copyfile)
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copy


class Environment:
    """A virtual environment that shares everything with this one, but not our package."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder)
        self.python = folder / "bin" / "python"
        variables = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", vars=variables))
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if "lpln_autopatch" not in path.name:
                (self.packages / path.name).symlink_to(path)

    def run(self, *arguments: str, **variables: str) -> str:
        """Run Python in the environment; return its stdout. It must succeed."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LPLN_")}
        result = subprocess.run(
            [self.python, *arguments],
            env={**inherited, **variables},
            capture_output=True,
            text=True,
            cwd=self.packages.parent,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stderr, result.stderr
        return result.stdout.strip()

    def pip(self, *arguments: str) -> None:
        """Run pip in it. There is no index: only what is named can be installed."""
        self.run("-m", "pip", *arguments, PIP_NO_INDEX="1", PIP_REQUIRE_VIRTUALENV="1")

    def ours(self) -> set[Path]:
        """The files of our package in it, byte code left out."""
        found = self.packages.glob("lpln_autopatch*/**/*")
        files = (path for path in found if path.is_file() and path.suffix != ".pyc")
        return {path.relative_to(self.packages) for path in files}


def test_build_is_reproducible(checkout):
    """Built elsewhere, from files with other times and permissions, every byte is the same; and
    the wheel of the checkout is the one that the sdist gives."""
    again, direct = build(checkout), build(checkout, "--wheel")
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    assert {path.name for path in again.iterdir()} == {wheel.name, sdist.name}
    for built in (again / sdist.name, again / wheel.name, direct / wheel.name):
        # Not the bytes themselves: pytest would look for the difference for an hour.
        assert digest(built) == digest(DIST / built.name)


def test_sdist_holds_what_is_needed_to_test_and_document():
    """Sources, tests and docs are in the sdist; caches, environments and built files are not."""
    (path,) = DIST.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    folders = {"lpln_autopatch", "tests", "docs", "sitecustomize_example"}
    files = {"README.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "LICENSE"}
    files |= {"Makefile", "pyproject.toml", "PKG-INFO"}
    assert {n.parts[0] for n in names if not n.parts[0].startswith(".")} == folders | files
    dotted = {".gitignore", ".mkdocs.yml", ".pre-commit-config.yaml", "docs/.hooks.py"}
    assert {str(n) for n in names if n.name.startswith(".")} == dotted
    for folder in folders:
        files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
        sources = {path for path in files if "__pycache__" not in path.parts}
        assert {name for name in names if name.parts[0] == folder} == sources


def test_upgrade_and_uninstall_leave_a_working_torch(checkout, tmp_path):
    """An older version works, an upgrade replaces all of it, and an uninstall leaves nothing: torch
    runs stock, with LPLN_PRECISION still set, and with AUTOWRAPT_BOOTSTRAP."""
    (wheel,) = DIST.glob("*.whl")
    source = checkout / "lpln_autopatch" / "__init__.py"
    version = f'__version__ = "{lpln_autopatch.__version__}"'
    assert version in source.read_text()
    source.write_text(source.read_text().replace(version, '__version__ = "0.0.1"'))
    (source.parent / "gone.py").touch()
    (older,) = build(checkout, "--wheel").iterdir()

    autowrapt = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "AUTOWRAPT_BOOTSTRAP": "lpln_autopatch"}
    environment = Environment(tmp_path / "venv")
    shared = {path.name for path in environment.packages.iterdir()}
    for path in (older, wheel):
        environment.pip("install", "--upgrade", str(path))
        found = environment.run("-c", "import lpln_autopatch; print(lpln_autopatch.__version__)")
        assert found == path.name.split("-")[1]
        assert environment.run("-c", OUTPUT_DTYPE) == "torch.float32"
        assert environment.run("-c", OUTPUT_DTYPE, LPLN_PRECISION="amp") == "torch.bfloat16"
        found = environment.run("-c", OUTPUT_DTYPE, LPLN_PRECISION="amp", **autowrapt)
        assert found == "torch.bfloat16"
    written_by_pip = {"INSTALLER", "REQUESTED", "direct_url.json"}
    installed = {path for path in environment.ours() if path.name not in written_by_pip}
    assert installed == {Path(name) for name in zipfile.ZipFile(wheel).namelist()}

    environment.pip("uninstall", "--yes", "lpln_autopatch")
    assert {path.name for path in environment.packages.iterdir()} == shared
    for variables in ({}, autowrapt):
        found = environment.run("-c", OUTPUT_DTYPE, LPLN_PRECISION="amp", **variables)
        assert found == "torch.float32"
    # Except where a route of the user's own still asks for it: then not a silent stock run.
    sitecustomize = {"PYTHONPATH": str(ROOT / "sitecustomize_example")}
    assert environment.run("-c", OUTPUT_DTYPE, **sitecustomize) == "torch.float32"
    with pytest.raises(AssertionError, match="No module named 'lpln_autopatch'"):
        environment.run("-c", OUTPUT_DTYPE, LPLN_PRECISION="amp", **sitecustomize)
