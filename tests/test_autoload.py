"""Autoload: LPLN_PRECISION is read once, after the import of torch; an error stops the process."""

from __future__ import annotations

import textwrap

import pytest
from routes import PROGRAM, ROUTES, needs_autoload, write_program
from support import A_ROUTE, run_python

from lpln_autopatch._torch_compat import TORCH_VERSION


@pytest.fixture
def program(tmp_path):
    return write_program(tmp_path)


@pytest.mark.parametrize("environment", ROUTES.values(), ids=ROUTES)
def test_routes_activate_once(environment):
    """Several routes give one activation and one wrapper."""
    code = """
        import logging
        logging.basicConfig(level="INFO", format="%(name)s %(levelname)s")
        import torch, wrapt
        import lpln_autopatch
        print(lpln_autopatch.status().source, lpln_autopatch.status().precision)
        print(len(list(wrapt.wrapper_chain(vars(torch.nn.LayerNorm)["forward"]))))
        lpln_autopatch.disable()
        print(len(list(wrapt.wrapper_chain(vars(torch.nn.LayerNorm)["forward"]))))
    """
    result = run_python("-c", textwrap.dedent(code), LPLN_PRECISION="bf16", **environment)
    assert result.stdout.split() == ["environment", "amp_bf16", "2", "1"]
    assert result.stderr.count("lpln_autopatch INFO") == 1


@pytest.mark.parametrize("value", ["", "off", " OFF ", "0", "no", "False"])
def test_off_is_as_if_unset(program, value):
    """off, 0, no, false and empty leave the program stock, with all routes open."""
    result = run_python(program, LPLN_PRECISION=value, **ROUTES["all"])
    assert result.stdout == "torch.float32\n"


@pytest.mark.parametrize("environment", ROUTES.values(), ids=ROUTES)
def test_wrong_value_stops_the_process(program, environment):
    """LPLN_PRECISION=bf61: one message that says what, from where, and what to do; no run."""
    result = run_python(program, check=False, LPLN_PRECISION="bf61", **environment)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("LPLN_PRECISION='bf61' is not a precision. Valid: amp, ") == 1
    assert ", off. Unset LPLN_PRECISION" in result.stderr
    assert "Traceback" not in result.stderr
    # (Without NumPy, torch has put a warning of its own in front.)
    assert result.stderr.splitlines()[-1].startswith("lpln_autopatch: LPLN_PRECISION='bf61'")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("1", "LPLN_PRECISION='1' is not a precision. Set amp: whatever autocast runs in. Valid:"),
        ("True", "LPLN_PRECISION='True' is not a precision. Set amp: whatever autocast runs in."),
        ("fp16", "Where autocast runs in float16, set amp_fp16. Unset LPLN_PRECISION to leave"),
    ],
)
def test_wrong_value_has_a_hint(program, value, hint):
    """Words for "on" of other programs, and the trainers' name for float16, stop with a hint."""
    result = run_python(program, check=False, LPLN_PRECISION=value, **A_ROUTE)
    assert (result.returncode, result.stdout) == (1, "")
    assert hint in result.stderr


@needs_autoload
def test_wrong_value_cannot_be_swallowed(tmp_path):
    """A program that guards its import of torch, or repeats it, does not run stock."""
    code = """
        for _ in range(2):
            try:
                import torch
            except Exception:
                pass
        print("ran")
    """
    result = run_python("-c", textwrap.dedent(code), check=False, LPLN_PRECISION="bf61")
    assert result.returncode == 1
    assert "ran" not in result.stdout


@needs_autoload
def test_wrong_value_is_seen_in_a_thread():
    """A thread, in which Python ignores SystemExit, gets an error that Python prints."""
    code = """
        import threading
        thread = threading.Thread(target=__import__, args=("torch",))
        thread.start()
        thread.join()
    """
    result = run_python("-c", textwrap.dedent(code), check=False, LPLN_PRECISION="bf61")
    assert "LPLN_PRECISION='bf61' is not a precision" in result.stderr


@needs_autoload
def test_broken_installation_stops_the_process(tmp_path):
    """A dependency that does not import is an error with the variable set, not a stock run."""
    (tmp_path / "wrapt.py").write_text("raise ImportError('no wrapt here')")
    code = "import torch; print('ran')"
    environment = {"PYTHONPATH": str(tmp_path)}
    result = run_python("-c", code, check=False, LPLN_PRECISION="amp", **environment)
    assert result.returncode != 0
    assert "no wrapt here" in result.stderr
    assert run_python("-c", code, **environment).stdout == "ran\n"


@pytest.mark.parametrize(
    ("hook", "environment", "reason"),
    [
        ("import wrapt; del wrapt.wrapper_chain", {"LPLN_PRECISION": "amp"}, "needs wrapt 2.4"),
        ("", {"LPLN_PRECISION": "fp32", "PYTHONWARNINGS": "error:precision"}, "never engages"),
    ],
)
@needs_autoload
def test_whatever_fails_stops_the_process_with_one_line(tmp_path, hook, environment, reason):
    """An old wrapt, a warning made an error: our line, and none of torch's advice."""
    (tmp_path / "sitecustomize.py").write_text(hook)
    code = "import torch; print('ran')"
    result = run_python("-c", code, check=False, PYTHONPATH=str(tmp_path), **environment)
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("lpln_autopatch: ")
    assert reason in last
    assert last.endswith("Unset LPLN_PRECISION to leave LayerNorm as PyTorch has it.")
    assert "Traceback" not in result.stderr


IMPORTED = """
import sys, torch
names = ("lpln_autopatch._activation", "wrapt", "importlib_metadata")
print(*(name in sys.modules for name in names))
"""


def test_unset_imports_nothing():
    """`import torch` imports neither wrapt nor importlib-metadata with the variable unset."""
    assert run_python("-c", IMPORTED).stdout.split() == ["False"] * 3


@needs_autoload
def test_unset_test_can_fail():
    """The test above looks at the right names: with the variable set they are imported."""
    result = run_python("-c", IMPORTED, LPLN_PRECISION="amp")
    assert result.stdout.split() == ["True"] * 3


@pytest.mark.parametrize("environment", [{}, {"LPLN_PRECISON": "amp"}])
def test_unset_costs_less_than_a_millisecond(environment):
    """Loading our entry point and calling it, as `import torch` does, stays under 1 ms."""
    code = """
        import time, torch, sys
        from importlib.metadata import entry_points
        (entry_point,) = entry_points(group="torch.backends", name="lpln_autopatch")
        for _ in range(20):
            for name in [n for n in sys.modules if n.startswith("lpln_autopatch")]:
                del sys.modules[name]
            start = time.perf_counter()
            entry_point.load()()
            print(time.perf_counter() - start)
    """
    # An installed package has its byte code. The least of them: a busy machine only adds.
    environment = {**environment, "PYTHONDONTWRITEBYTECODE": ""}
    least = min(map(float, run_python("-c", textwrap.dedent(code), **environment).stdout.split()))
    assert least < 0.001


@needs_autoload
def test_barred_module_of_ours_is_no_fault():
    """Tests bar a module by setting it to None in sys.modules: we activate all the same."""
    first = "import sys; sys.modules['lpln_autopatch.integrations.composer'] = None"
    result = run_python("-c", f"{first}\n{PROGRAM}", LPLN_PRECISION="amp")
    assert result.stdout.split() == ["torch.bfloat16"]


@needs_autoload
@pytest.mark.parametrize(
    "first",
    [
        "import lpln_autopatch",
        "import lpln_autopatch; lpln_autopatch.enable('bf16')",
        "from lpln_autopatch import enable, status, exempt; enable('bf16')",
        "from lpln_autopatch import low_precision_layernorm as l; l('bf16').__enter__()",
        "import lpln_autopatch._activation as a; a.enable('bf16')",
        "import lpln_autopatch; lpln_autopatch.status()",
        "import lpln_autopatch; lpln_autopatch.Precision('amp')",
        "import lpln_autopatch.backends",
        "from lpln_autopatch.backends import Backend, native",
        "import lpln_autopatch._patch",
        "import lpln_autopatch._forward",
        "import lpln_autopatch._torch_compat",
        "from lpln_autopatch import LPLayerNorm, apply_low_precision_layernorm",
        "from lpln_autopatch import report",
    ],
)
def test_our_import_before_torchs(first):
    """Importing us before torch works with the variable set, though torch's import re-enters us."""
    code = f"{first}\n{PROGRAM}\nimport lpln_autopatch; print(lpln_autopatch.status().precision)"
    result = run_python("-c", code, LPLN_PRECISION="amp")
    precision = "amp_bf16" if "bf16" in first else "amp"
    assert result.stdout.split() == ["torch.bfloat16", precision]


DTYPE = """
def dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype)
"""


def test_disable_before_torch_is_imported_holds():
    """disable() with LPLN_PRECISION set imports torch itself, and then undoes the variable."""
    code = "import lpln_autopatch; lpln_autopatch.disable(); import torch; print(dtype())"
    result = run_python("-c", DTYPE + code, LPLN_PRECISION="amp", **A_ROUTE)
    assert result.stdout == "torch.float32\n"


ENABLED_DURING = """
import sys
import lpln_autopatch

class During:
    done = False
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1] and not During.done:
            During.done = True
            try:
                lpln_autopatch.enable("bf16")
            except (AttributeError, ImportError) as error:
                print("partially initialized module 'torch" in str(error))

sys.meta_path.insert(0, During())
import torch
from inspect import unwrap
print(lpln_autopatch.status().source, dtype())
lpln_autopatch.enable()
print(dtype())
lpln_autopatch.disable()
print(dtype(), vars(torch.nn.LayerNorm)["forward"] is unwrap(torch.nn.LayerNorm.forward))
"""


@pytest.mark.parametrize("precision", ["", "amp"])
@pytest.mark.parametrize("module", ["torch.version", "torch.nn.functional", "torch.optim"])
def test_enable_in_the_middle_of_torchs_import(module, precision):
    """enable() is refused there, as Python refuses it, and works once torch is imported."""
    code = DTYPE + ENABLED_DURING
    result = run_python("-c", code, module, LPLN_PRECISION=precision, **A_ROUTE)
    source = "environment torch.bfloat16" if precision else "None torch.float32"
    assert result.stdout.splitlines() == ["True", source, "torch.bfloat16", "torch.float32 True"]


FAILS_ONCE = """
import sys

class FailsOnce:
    done = False
    def find_spec(self, name, path=None, target=None):
        if name == "torch.version" and not FailsOnce.done:
            FailsOnce.done = True
            raise ImportError("not yet")

sys.meta_path.insert(0, FailsOnce())
try:
    import torch
except ImportError as error:
    print(error, "lpln_autopatch._activation" in sys.modules)
try:
    import torch
except ImportError as error:
    sys.exit("torch refuses" if "once per process" in str(error) else repr(error))
import lpln_autopatch
print(dtype(), lpln_autopatch.status().source)
"""


def test_import_of_torch_that_fails_and_is_repeated():
    """A failing import passes its own error and activates nothing; the next that succeeds does.

    torch 2.15 refuses the second by itself; 2.13 and 1.13 do not.
    """
    result = run_python("-c", DTYPE + FAILS_ONCE, check=False, LPLN_PRECISION="amp", **A_ROUTE)
    first, *second = result.stdout.splitlines()
    assert first == "not yet False"
    if TORCH_VERSION < (2, 14):
        assert second == ["torch.bfloat16 environment"]
    else:
        assert second == ["torch.bfloat16 environment"] or "torch refuses" in result.stderr


FACTORY = """
import sys, types
made = types.SimpleNamespace(LowPrecisionLayerNorm=lambda precision: f"lowers {precision}")
sys.modules["lpln_autopatch.integrations.lightning"] = made
from importlib_metadata import entry_points
(factory,) = entry_points(group="lightning.pytorch.callbacks_factory", name="lpln_autopatch")
print(factory.load()())
"""


@pytest.mark.parametrize(
    ("environment", "callbacks"),
    [
        ({}, "[]"),
        ({"LPLN_PRECISION": "off"}, "[]"),
        ({"LPLN_PRECISION": "bf16", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "['lowers bf16']"),
        ({"LPLN_PRECISION": "bf16", **A_ROUTE}, "[]"),
    ],
)
def test_lightnings_factory_acts_where_nothing_else_has(environment, callbacks):
    """Lightning's Trainer gets the callback if LPLN_PRECISION is set and no route has read it."""
    assert run_python("-c", f"import torch\n{FACTORY}", **environment).stdout == f"{callbacks}\n"
