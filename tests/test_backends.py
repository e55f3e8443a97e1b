"""Backends: the choice by name, those of other packages, and their faults."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from support import A_ROUTE, add_distribution, autocast, output_dtype, run_python

import lpln_autopatch as lpln
from lpln_autopatch import (
    NoEffectWarning,
    Precision,
    _torch_compat,
    backends,
    low_precision_layernorm,
)
from lpln_autopatch._torch_compat import HAS_RMS_NORM, autocast_dtype
from lpln_autopatch.backends import native

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("name", ["auto", "native"])
def test_native_is_the_default(name):
    """auto is native where PyTorch has the kernels."""
    assert backends.resolve(name, Precision.AMP) == ("native", native.normalise)


def test_unknown_backend_is_refused(monkeypatch):
    """An unknown name is a ValueError with where it came from and the valid names."""
    with pytest.raises(ValueError, match=r"backend='cuda' is not a backend\. Valid: auto, "):
        lpln.enable(backend="cuda")
    monkeypatch.setenv("LPLN_BACKEND", "cuda")
    with pytest.raises(ValueError, match="LPLN_BACKEND='cuda' is not a backend"):
        lpln.enable()
    lpln.enable(backend="native")
    assert lpln.status().backend == "native"


@pytest.fixture(scope="module")
def third_party(tmp_path_factory):
    """A folder into which a tiny distribution with two backends is installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pyproject.toml").write_text(
        textwrap.dedent(
            """
            [build-system]
            requires = ["hatchling"]
            build-backend = "hatchling.build"
            [project]
            name = "tiny_backend"
            version = "1.0"
            [project.entry-points."lpln_autopatch.backends"]
            tiny = "tiny_backend:normalise"
            both = "tiny_backend:both"
            broken = "tiny_backend:no_such_name"
            """
        )
    )
    (source / "tiny_backend.py").write_text(
        textwrap.dedent(
            """
            import torch
            def normalise(x, normalized_shape, weight, bias, eps, dtype):
                y = torch.nn.functional.layer_norm(x, normalized_shape)
                return torch.full_like(y, 7, dtype=dtype)

            class Both:
                def __call__(self, *call):
                    return normalise(*call)
                def rms_norm(self, x, normalized_shape, weight, eps, dtype):
                    y = torch.nn.functional.rms_norm(x, normalized_shape)
                    assert y.dtype is x.dtype
                    return torch.full_like(y, 8, dtype=dtype)

            both = Both()
            """
        )
    )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(target), str(source)], check=True, capture_output=True)
    return str(target)


def test_third_party_backend(third_party):
    """A backend of another distribution is found by name, imported only then, and runs.

    It calls PyTorch's function, which is not lowered again.
    """
    code = """
        import sys, torch, lpln_autopatch
        lpln_autopatch.enable()
        assert "tiny_backend" not in sys.modules
        lpln_autopatch.enable(backend="tiny")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.nn.LayerNorm(8)(torch.randn(4, 8))
        assert y.dtype is torch.bfloat16 and (y == 7).all()
        print(lpln_autopatch.status().backend)
        try:
            lpln_autopatch.enable(backend="broken")
        except ImportError as error:
            print("tiny_backend:no_such_name" in str(error), lpln_autopatch.status().backend)
        try:
            lpln_autopatch.enable(backend="tny")
        except ValueError as error:
            print("tiny" in str(error))
    """
    result = run_python("-c", textwrap.dedent(code), PYTHONPATH=third_party)
    assert result.stdout.split() == ["tiny", "True", "tiny", "True"]


@pytest.mark.skipif(not HAS_RMS_NORM, reason="torch 2.4 has RMSNorm; CI runs this on later ones")
def test_rms_norm_is_a_backends_that_has_one(third_party):
    """One with an attribute `rms_norm` normalises that as well; for another one native does."""
    code = """
        import torch, lpln_autopatch
        x, norm = torch.randn(4, 8), torch.nn.RMSNorm(8)
        for backend in ("both", "tiny"):
            lpln_autopatch.enable(backend=backend, norms="all")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, z = norm(x), torch.nn.LayerNorm(8)(x)
            print(y.dtype, (y == 8).all().item(), (z == 7).all().item())
    """
    result = run_python("-c", textwrap.dedent(code), PYTHONPATH=third_party)
    assert result.stdout.split() == [
        *(["torch.bfloat16", "True", "True", "torch.bfloat16", "False", "True"])
    ]


def test_variable_chooses_the_backend(third_party):
    """LPLN_BACKEND holds wherever no backend is named; a wrong one stops the process."""
    code = """
        import torch, lpln_autopatch
        lpln_autopatch.enable()
        print(lpln_autopatch.status().backend)
        lpln_autopatch.enable(backend="native")
        print(lpln_autopatch.status().backend)
    """
    environment = {"PYTHONPATH": third_party, "LPLN_PRECISION": "amp"}
    result = run_python("-c", textwrap.dedent(code), LPLN_BACKEND="tiny", **environment)
    assert result.stdout.split() == ["tiny", "native"]


@pytest.mark.skipif(
    _torch_compat.TORCH_VERSION < (2, 5),
    reason="torch >= 2.5 loads entry points; CI runs this there",
)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tny", "LPLN_BACKEND='tny' is not a backend"),
        ("apex", "LPLN_BACKEND='apex': NVIDIA apex is not installed"),
    ],
)
def test_wrong_variable_stops_the_process(name, message):
    """LPLN_BACKEND that is unknown or unusable: one message, no traceback, no run."""
    code = "import torch; print('ran')"
    result = run_python("-c", code, check=False, LPLN_PRECISION="amp", LPLN_BACKEND=name)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert run_python("-c", code, LPLN_BACKEND=name).stdout == "ran\n"


def test_precision_is_checked_with_the_backend(layer_norm):
    """A backend is named together with a precision that never engages: accepted, stock."""
    with pytest.warns(NoEffectWarning):
        lpln.enable("fp32", backend="native")
    assert output_dtype(layer_norm) is FP32


def failing(*arguments: object) -> torch.Tensor:
    raise KeyError("from the backend")


@pytest.fixture
def failing_backend(monkeypatch):
    """A backend that raises when it is called."""
    monkeypatch.setitem(backends._BUILT_IN, "failing", lambda: failing)


def test_exception_in_a_backend_passes_unchanged(layer_norm, failing_backend):
    """It reaches the caller as it is; autocast and what is in force are as before the call."""
    lpln.enable("bf16", backend="failing")
    active = lpln.status()
    with autocast():
        with pytest.raises(KeyError, match="from the backend"):
            layer_norm(torch.randn(4, 8))
        assert autocast_dtype("cpu") is BF16
        assert lpln.status() == active
        with low_precision_layernorm("bf16", backend="native"):
            assert layer_norm(torch.randn(4, 8)).dtype is BF16
    assert output_dtype(lpln.exempt(torch.nn.LayerNorm(8))) is FP32


@pytest.fixture
def faulty_package(tmp_path):
    """A folder with a distribution whose backends fail in different ways."""
    (tmp_path / "raises_at_import.py").write_text("raise RuntimeError('no driver')")
    (tmp_path / "not_a_function.py").write_text("normalise = 'a name'")
    backends = {"raises": "raises_at_import:normalise", "constant": "not_a_function:normalise"}
    add_distribution(tmp_path, "faulty", **backends, missing="no_such_module:normalise")
    return str(tmp_path)


FAULTS = {
    "raises": "raises_at_import:normalise does not load: RuntimeError('no driver')",
    "constant": "not_a_function:normalise is 'a name', not a function",
    "missing": "no_such_module:normalise does not load: ModuleNotFoundError",
}


def test_backend_that_does_not_load_is_refused(faulty_package):
    """enable() and a block say which and why, and what was in force before still is."""
    code = """
        import torch, lpln_autopatch
        print(lpln_autopatch.status().precision)
        lpln_autopatch.enable("bf16")
        for name in ("raises", "constant", "missing"):
            for ask in (lpln_autopatch.enable, lpln_autopatch.low_precision_layernorm):
                try:
                    ask("amp", backend=name)
                except ImportError as error:
                    print(error)
        print(lpln_autopatch.status().precision, lpln_autopatch.status().backend)
    """
    result = run_python("-c", textwrap.dedent(code), PYTHONPATH=faulty_package)
    first, *errors, last = result.stdout.splitlines()
    assert (first, last) == ("None", "amp_bf16 native")
    assert len(errors) == 6
    for name, error in zip([n for n in FAULTS for _ in range(2)], errors, strict=True):
        assert FAULTS[name] in error


@pytest.mark.parametrize("name", FAULTS)
def test_variable_with_a_backend_that_does_not_load_stops_the_process(faulty_package, name):
    """LPLN_BACKEND names it: no stock run, one message with the reason."""
    environment = {**A_ROUTE, "PYTHONPATH": f"{A_ROUTE['PYTHONPATH']}:{faulty_package}"}
    code = "import torch; print('ran')"
    result = run_python(
        "-c", code, check=False, LPLN_PRECISION="amp", LPLN_BACKEND=name, **environment
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert FAULTS[name] in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("lpln_autopatch: ")


NORMS_DTYPE = """
def dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype)
"""


@pytest.mark.parametrize("package", [False, True])
def test_backend_that_imports_torch_may_be_imported_first(tmp_path, package):
    """LPLN_BACKEND names a module whose first line is `import torch`: it is loaded when called.

    Imported before torch, it is only half there when the variable is read.
    """
    home = tmp_path / "half" if package else tmp_path
    home.mkdir(exist_ok=True)
    (tmp_path / "half" / "__init__.py" if package else tmp_path / "half.py").write_text(
        "import torch\ncalls = []\n"
        "def normalise(x, shape, weight, bias, eps, dtype):\n"
        "    calls.append(eps)\n"
        "    return torch.layer_norm(x, shape, weight, bias, eps).to(dtype)\n"
        "not_a_function = 0\n"
    )
    add_distribution(tmp_path, "half", half="half:normalise", wrong="half:not_a_function")
    environment = {"PYTHONPATH": f"{A_ROUTE['PYTHONPATH']}:{tmp_path}"}
    code = "import half, torch, lpln_autopatch\n" + NORMS_DTYPE + "print(dtype(), half.calls)\n"
    code += "print(lpln_autopatch.status().backend)"
    variables = {"LPLN_PRECISION": "amp", **A_ROUTE, **environment}
    result = run_python("-c", code, LPLN_BACKEND="half", **variables)
    assert result.stdout.splitlines() == ["torch.bfloat16 [1e-05]", "half"]
    result = run_python("-c", code, check=False, LPLN_BACKEND="wrong", **variables)
    assert "LPLN_BACKEND='wrong': the backend half:not_a_function is 0" in result.stderr
