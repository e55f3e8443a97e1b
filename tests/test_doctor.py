"""`python -m lpln_autopatch`: what it finds in processes that are started in different ways."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from support import A_ROUTE, add_distribution, run_python

import lpln_autopatch
from lpln_autopatch._torch_compat import TORCH_VERSION

ROUTES = {
    "torch.backends": {},
    "sitecustomize": A_ROUTE,
    "autowrapt": {"AUTOWRAPT_BOOTSTRAP": "lpln_autopatch", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
}
if TORCH_VERSION < (2, 5):
    del ROUTES["torch.backends"]


# Both outputs of one diagnosis, and the exit status of both.
BOTH = """
import contextlib, sys
from lpln_autopatch import __main__, _doctor
with contextlib.redirect_stdout(sys.stderr):
    found = _doctor.diagnose()
_doctor.diagnose = lambda: found
as_json = __main__.main(["--json"])
print("---")
as_text = __main__.main([])
sys.exit(as_text if as_text == as_json else 3)
"""


def both(**environment):
    """Return the exit status, the findings in JSON, and the last line for people."""
    result = run_python("-c", BOTH, check=False, **environment)
    as_json, _, text = result.stdout.partition("---\n")
    return result.returncode, json.loads(as_json), text.splitlines()[-1]


def doctor(**environment):
    """Run the doctor; return its exit status and its findings."""
    result = run_python("-m", "lpln_autopatch", "--json", check=False, **environment)
    return result.returncode, json.loads(result.stdout)


@pytest.mark.parametrize("route", ROUTES)
def test_route_that_acted_is_named(route):
    """The doctor names the route that acted, and the request that the route made active."""
    status, found = doctor(LPLN_PRECISION="bf16", **ROUTES[route])
    assert (status, found["problem"], found["acted"]) == (0, None, route)
    assert found["routes"][route] == {"usable": True, "detail": ""}
    active = [found[key] for key in ("precision", "backend", "norms", "source", "installed")]
    assert active == ["amp_bf16", "native", ["layer_norm"], "environment", True]


def test_norms_are_those_of_the_variable():
    """LPLN_NORMS is among the variables; what it names is in force, is tried, and is said."""
    result = run_python(
        "-m", "lpln_autopatch", LPLN_PRECISION="bf16", LPLN_NORMS="group_norm", **A_ROUTE
    )
    rows = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert ["LPLN_NORMS", "group_norm"] in rows
    assert ["norms", "group_norm"] in rows
    last = "GroupNorm is lowered: precision amp_bf16, by the route sitecustomize."
    assert result.stdout.splitlines()[-1] == last


@pytest.mark.parametrize("value", ["", "off"])
def test_nothing_asked_for_is_no_problem(value):
    """Nothing is active with the variable unset or off, and the exit status is 0."""
    status, found, last = both(LPLN_PRECISION=value, **A_ROUTE)
    assert (status, found["problem"], found["acted"], found["precision"]) == (0, None, None, None)
    assert not found["installed"]
    assert found["environment"]["LPLN_PRECISION"] == value
    assert last == f"LPLN_PRECISION is {value!r}: LayerNorm is as PyTorch has it."


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"LPLN_PRECISION": "bf61", **A_ROUTE}, "LPLN_PRECISION='bf61' is not a precision"),
        ({"LPLN_PRECISION": "fp32", **A_ROUTE}, "precision 'fp32' never engages."),
        ({"LPLN_PRECISION": "amp", "LPLN_NORMS": "x", **A_ROUTE}, "LPLN_NORMS='x': 'x' is no"),
        ({"LPLN_PRECISION": "amp", "LPLN_BACKEND": "x", **A_ROUTE}, "LPLN_BACKEND='x' is not"),
        (
            {"LPLN_PRECISION": "amp", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            "no route has read it (torch.backends: ",
        ),
        # Invalid, and no route to say so.
        (
            {"LPLN_PRECISION": "bf61", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            "LPLN_PRECISION='bf61' is not a precision",
        ),
    ],
)
def test_problem_is_exit_status_1_with_the_reason(environment, problem):
    """LPLN_PRECISION is set and nothing is lowered: status 1, in JSON and as the last line."""
    status, found, last = both(**environment)
    assert status == 1
    assert found["problem"].startswith(problem)
    assert last == f"LPLN_PRECISION does not lower LayerNorm: {found['problem']}"


def test_patcher_that_hides_us_is_a_problem(tmp_path):
    """The doctor runs a LayerNorm: one that somebody replaced after us is not lowered."""
    (tmp_path / "sitecustomize.py").write_text(
        """
import wrapt

def replace(torch):
    def theirs(self, x):
        return torch.layer_norm(x, self.normalized_shape)
    torch.nn.LayerNorm.forward = theirs

wrapt.register_post_import_hook(replace, "torch")
"""
    )
    path = f"{A_ROUTE['PYTHONPATH']}:{tmp_path}"
    status, found = doctor(LPLN_PRECISION="amp", **{**A_ROUTE, "PYTHONPATH": path})
    assert status == 1
    assert (
        "gives torch.float32: its forward is <function replace.<locals>.theirs" in found["problem"]
    )


@pytest.mark.parametrize("module", ["torch", "wrapt", "importlib_metadata"])
def test_broken_import_is_a_problem(tmp_path, module):
    """A broken import of torch or wrapt is a problem, with or without the variable."""
    (tmp_path / f"{module}.py").write_text("raise ImportError('broken here')")
    status, found = doctor(PYTHONPATH=str(tmp_path))
    assert status == 1
    why = "torch, or what lpln_autopatch needs, fails: ImportError('broken here')."
    assert found["problem"] == why


def test_verdict_names_the_variable_only_if_it_is_set(tmp_path):
    """The verdict without LPLN_PRECISION is about torch, and nothing else."""
    (tmp_path / "torch.py").write_text("raise ImportError('broken here')")
    result = run_python("-m", "lpln_autopatch", check=False, PYTHONPATH=str(tmp_path))
    assert result.stdout.splitlines()[-1].startswith("torch, or what lpln_autopatch needs, fails")


def test_old_wrapt_is_a_problem(tmp_path):
    """A wrapt that imports and lacks what we use of it: JSON and what to do, no traceback."""
    (tmp_path / "sitecustomize.py").write_text("import wrapt; del wrapt.wrapper_chain")
    status, found = doctor(PYTHONPATH=str(tmp_path), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert status == 1
    assert "needs wrapt 2.4 or later" in found["problem"]
    assert "pip install" in found["problem"]


@pytest.mark.parametrize(
    ("call", "environment", "problem"),
    [
        (
            "enable('bf16')",
            {"LPLN_PRECISION": "amp"},
            "The active request comes from enable in this",
        ),
        ("enable('bf16')", {}, None),
        ("enable('fp32')", {}, None),
        ("enable('bf16')", {"LPLN_PRECISION": "amp", **A_ROUTE}, None),
        ("enable('fp32')", {"LPLN_PRECISION": "amp", **A_ROUTE}, "precision 'fp32' never engages."),
        ("disable()", {"LPLN_PRECISION": "amp", **A_ROUTE}, "disable in this process has undone"),
    ],
)
def test_call_in_the_process_is_not_taken_for_a_route(tmp_path, call, environment, problem):
    """A hook that calls us is named as what it is; where the variable is set and unread, status 1.

    And so is one that takes back what a route has done.
    """
    hook = f"lambda torch: lpln_autopatch.{call}"
    (tmp_path / "sitecustomize.py").write_text(
        f"import lpln_autopatch, wrapt; wrapt.register_post_import_hook({hook}, 'torch')"
    )
    path = ":".join(filter(None, (environment.get("PYTHONPATH"), str(tmp_path))))
    environment = {**A_ROUTE, **environment, "PYTHONPATH": path}
    result = run_python("-m", "lpln_autopatch", check=False, **environment)
    last = result.stdout.splitlines()[-1]
    if call == "enable('fp32')" and "LPLN_PRECISION" not in environment:
        assert result.returncode == 0
        never = "precision fp32 never engages, by enable in this process."
        assert last == f"LayerNorm is stock: {never}"
    elif problem is None:
        assert result.returncode == 0
        assert last == "LayerNorm is lowered: precision amp_bf16, by enable in this process."
    else:
        assert result.returncode == 1
        assert last.startswith("LPLN_PRECISION does not lower LayerNorm: ")
        assert problem in last


def test_backends_are_listed_usable_or_not(tmp_path):
    """Built in or of another distribution, each backend is listed; why not, if it cannot be.

    One that prints or exits when it is imported spoils nothing.
    """
    (tmp_path / "thirdparty.py").write_text(
        "print('imported')\ndef refuses(*arguments):\n    raise KeyError('no')"
    )
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    backends = {"refuses": "thirdparty:refuses", "broken": "thirdparty:missing"}
    add_distribution(tmp_path, "thirdparty", **backends, exits="exits:anything")
    path = f"{A_ROUTE['PYTHONPATH']}:{tmp_path}"
    environment = {**A_ROUTE, "PYTHONPATH": path, "LPLN_BACKEND": "refuses"}
    status, found = doctor(LPLN_PRECISION="amp", **environment)
    assert status == 1
    assert found["problem"] == "a LayerNorm on the CPU fails: KeyError('no')."
    backends = found["backends"]
    assert backends["native"] == backends["refuses"] == {"usable": True, "detail": ""}
    assert backends["auto"] == {"usable": True, "detail": "refuses"}
    assert backends["exits"] == {"usable": False, "detail": "SystemExit(3)"}
    assert not backends["broken"]["usable"]
    assert "thirdparty:missing does not load: AttributeError" in backends["broken"]["detail"]
    assert not backends["apex"]["usable"]
    assert "NVIDIA apex is not installed" in backends["apex"]["detail"]


def test_doctor_prints_sections_and_a_verdict():
    """The text has versions, variables, the active request, routes, backends, devices, verdict."""
    result = run_python("-m", "lpln_autopatch", LPLN_PRECISION="amp", **A_ROUTE)
    lines = result.stdout.splitlines()
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles == [
        *("versions", "environment", "active", "routes", "backends", "devices"),
        "LayerNorm is lowered: precision amp, by the route sitecustomize.",
    ]
    rows = [tuple(line.split(maxsplit=1)) for line in lines if line.startswith(" ")]
    assert ("LPLN_PRECISION", "amp") in rows
    assert ("sitecustomize", "yes") in rows
    assert ("native", "yes") in rows
    assert ("cpu",) in rows


def test_versions_are_those_of_status():
    """The build of torch is in them, as "+cpu"."""
    _, found = doctor(**A_ROUTE)
    assert found["versions"] == lpln_autopatch.status().versions


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; CI has none")
def test_fused_is_of_no_use_on_a_cpu():
    """The backend fused loads with Triton, but hands every call to native."""
    _, found = doctor(**A_ROUTE)
    assert found["devices"] == ["cpu"]
    assert not found["backends"]["fused"]["usable"]
    if importlib.util.find_spec("triton") and TORCH_VERSION >= (2, 6):
        assert "on a CPU every call goes to native" in found["backends"]["fused"]["detail"]


def test_mistakes_are_advised_of():
    """Variables that say nothing, and names that only a program can match, in both outputs."""
    result = run_python("-m", "lpln_autopatch", LPLN_BACKED="lean", LPLN_PRECISION="amp", **A_ROUTE)
    advice, verdict = result.stdout.splitlines()[-2:]
    assert advice == "LPLN_BACKED has no effect: did you mean LPLN_BACKEND?"
    assert verdict.startswith("LayerNorm is lowered")
    if TORCH_VERSION >= (2, 0):
        _, found = doctor(LPLN_EXEMPT="head", LPLN_PRECISION="amp", **A_ROUTE)
        (advice,) = found["advice"]
        assert "LPLN_SUMMARY=1 lists at exit the names that matched none" in advice
