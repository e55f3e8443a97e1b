"""sitecustomize_example: our sitecustomize, which `lpln run` uses too."""

from __future__ import annotations

import pytest
from routes import SITECUSTOMIZE, write_program
from support import run_python


@pytest.fixture
def program(tmp_path):
    return write_program(tmp_path)


def test_sitecustomize_without_wrapt_stops_what_uses_torch(tmp_path):
    """A Python that lacks wrapt runs programs without torch, and refuses to import torch."""
    (tmp_path / "wrapt.py").write_text("raise ImportError('no wrapt here')")
    environment = {
        "PYTHONPATH": f"{SITECUSTOMIZE}:{tmp_path}",
        "LPLN_PRECISION": "amp",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    guarded = "try:\n    import torch\nexcept Exception:\n    print('went on')"
    result = run_python("-c", guarded, check=False, **environment)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "no wrapt here" in result.stderr
    assert "wrapt cannot be imported" in result.stderr
    assert run_python("-c", "print('ran')", **environment).stdout == "ran\n"


def test_sitecustomize_without_the_package_stops_what_uses_torch(tmp_path):
    """A Python that has wrapt and lacks the package refuses torch, also where it is guarded."""
    (tmp_path / "lpln_autopatch.py").write_text("raise ImportError('no package here')")
    environment = {"PYTHONPATH": f"{SITECUSTOMIZE}:{tmp_path}", "LPLN_PRECISION": "amp"}
    guarded = "try:\n    import torch\nexcept Exception:\n    print('went on')"
    autoload = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    result = run_python("-c", guarded, check=False, **environment, **autoload)
    assert (result.returncode, result.stdout) == (1, "")
    assert "LPLN_PRECISION is set, and no package here." in result.stderr


@pytest.mark.parametrize("precision", ["", "amp"])
def test_shadowed_sitecustomize_still_runs(tmp_path, program, precision):
    """The sitecustomize that ours hides runs, and its errors do not cost the activation."""
    (tmp_path / "sitecustomize.py").write_text("print('theirs'); raise KeyError('theirs fails')")
    result = run_python(program, PYTHONPATH=f"{SITECUSTOMIZE}:{tmp_path}", LPLN_PRECISION=precision)
    assert result.stdout.split() == ["theirs", "torch.bfloat16" if precision else "torch.float32"]
    assert "theirs fails" in result.stderr


def test_sitecustomize_folder_may_be_on_the_path_twice(tmp_path, program):
    """The folder under a second name is not taken for the module that it shadows."""
    (tmp_path / "again").symlink_to(SITECUSTOMIZE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text("print('theirs')")
    path = f"{SITECUSTOMIZE}:{tmp_path / 'again'}:{tmp_path / 'other'}"
    result = run_python(program, PYTHONPATH=path, LPLN_PRECISION="amp")
    assert result.stdout.split() == ["theirs", "torch.bfloat16"]
    assert "Error" not in result.stderr


@pytest.mark.parametrize("value", ["", "off", "0"])
def test_sitecustomize_imports_nothing_when_off(value):
    """The hook's library is not imported either with the variable off."""
    code = "import sys; print('wrapt' in sys.modules)"
    result = run_python("-c", code, LPLN_PRECISION=value, PYTHONPATH=SITECUSTOMIZE)
    assert result.stdout.split() == ["False"]


def test_sitecustomize_does_not_import_torch():
    """The hook waits for the program to import torch, if it ever does."""
    code = "import sys; print('torch' in sys.modules, 'lpln_autopatch' in sys.modules)"
    result = run_python("-c", code, LPLN_PRECISION="amp", PYTHONPATH=SITECUSTOMIZE)
    assert result.stdout.split() == ["False", "False"]
