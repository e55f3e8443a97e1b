from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import importlib_metadata
import pytest
from support import ROOT, run_python

import lpln_autopatch

DISTRIBUTION = importlib_metadata.distribution("lpln_autopatch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    """Every module and py.typed are in the wheel; tests and docs are not, but for the script that
    `bench loss` trains, and the sitecustomize of `lpln run`."""
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "lpln_autopatch").rglob("*.py")}
    metadata = f"lpln_autopatch-{lpln_autopatch.__version__}.dist-info/"
    assert {n for n in names if not n.startswith(metadata)} == {
        *modules,
        "lpln_autopatch/py.typed",
        "lpln_autopatch/bench/train.py",
        "lpln_autopatch/sitecustomize/sitecustomize.py",
    }
    assert f"{metadata}licenses/LICENSE" in names


def test_metadata_has_the_one_version_and_three_dependencies(wheel):
    """The version is lpln_autopatch.__version__; without extras, three packages are needed."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = message_from_string(archive.read(name).decode())
    assert metadata["Version"] == lpln_autopatch.__version__ == DISTRIBUTION.version
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.split("[>=<]", r)[0] for r in required} == {"torch", "wrapt", "importlib-metadata"}


def test_citation_has_the_version():
    """CITATION.cff is of the version that the package has."""
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {lpln_autopatch.__version__}\n" in citation


def test_security_names_every_entry_point():
    """SECURITY.md says what of ours others call: each group is in it."""
    text = (ROOT / "SECURITY.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    groups = re.findall(r'^\[project\.entry-points\."?([^"\]]+)"?\]$', project, re.MULTILINE)
    assert len(groups) == 4
    for group in groups:
        assert f"`{group}`" in text


def test_entry_points():
    """torch's group and autowrapt's lead to the one function."""
    (ours,) = importlib_metadata.entry_points(group="torch.backends", name="lpln_autopatch")
    (autowrapt,) = importlib_metadata.entry_points(group="lpln_autopatch")
    assert ours.value == autowrapt.value == "lpln_autopatch._autoload:on_torch_import"
    assert autowrapt.name == "torch"
    (command,) = importlib_metadata.entry_points(group="console_scripts", name="lpln")
    assert command.value == "lpln_autopatch.__main__:main"
    for group in ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"):
        (factory,) = importlib_metadata.entry_points(group=group, name="lpln_autopatch")
        assert factory.value == "lpln_autopatch._autoload:lightning_callbacks"


def test_installed_package_is_what_is_tested():
    """The tests run against the installation, not the checkout that they lie in."""
    if '"editable": true' in (DISTRIBUTION.read_text("direct_url.json") or ""):
        pytest.skip("installed editable; `make test` installs the wheel")
    assert Path(lpln_autopatch.__file__) == Path(
        DISTRIBUTION.locate_file("lpln_autopatch/__init__.py")
    )
    found = run_python("-c", "import lpln_autopatch; print(lpln_autopatch.__file__)").stdout
    assert found.strip() == lpln_autopatch.__file__


def test_metadata_is_read_with_importlib_metadata():
    """No module reads metadata with the standard library."""
    for path in (ROOT / "lpln_autopatch").rglob("*.py"):
        assert not re.search(r"importlib\.metadata|importlib import metadata", path.read_text()), (
            path
        )


def test_files_stay_short():
    """A package that is read in an hour: no file of 250 lines or more."""
    for path in (ROOT / "lpln_autopatch").rglob("*.py"):
        assert len(path.read_text().splitlines()) < 250, path
