"""LPLN_PRECISION without a line of code: every route, in processes of their own."""

from __future__ import annotations

import textwrap

import pytest
from support import A_ROUTE, ROOT, run_python

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

# A program that knows nothing of this package.
PROGRAM = """
import torch
def dtype(_=None):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype)
if __name__ == "__main__":
    print(dtype())
"""


@pytest.fixture
def program(tmp_path):
    """The path of that program."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.mark.parametrize("environment", ROUTES.values(), ids=ROUTES)
def test_variable_lowers_an_unchanged_program(program, environment):
    """Each route, and all of them together, lower a program that does not import us."""
    assert run_python(program, **environment).stdout == "torch.float32\n"
    lowered = run_python(program, LPLN_PRECISION="BF16", **environment)
    assert lowered.stdout == "torch.bfloat16\n"


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


def warned(**environment) -> str:
    """Return our output of `import torch`, where warnings are errors and all routes open."""
    code = "import warnings; warnings.simplefilter('error', UserWarning); import torch"
    result = run_python("-c", code, **{**ROUTES["all"], **environment})
    return "".join(line for line in result.stderr.splitlines() if "LPLN" in line)


@needs_autoload
@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"LPLN_PRECISON": "amp"}, "LPLN_PRECISON has no effect: did you mean LPLN_PRECISION?"),
        (
            {"LPLN_PRECISION": "amp", "LPLN_BACKED": "lean"},
            "LPLN_BACKED has no effect: did you mean LPLN_BACKEND?",
        ),
        (
            {"LPLN_NORMS": "all", "LPLN_SUMMARY": "1"},
            "LPLN_NORMS and LPLN_SUMMARY have no effect at this import without LPLN_PRECISION: "
            "did you mean LPLN_PRECISION=amp, too?",
        ),
        *(
            ({name: "x"}, f"{name} has no effect at this import without LPLN_PRECISION: ")
            for name in ("LPLN_BACKEND", "LPLN_EXEMPT")
        ),
    ],
)
def test_misspelt_or_lonely_variable_is_one_line(environment, line):
    """The line appears once on stderr, with all routes open, and where warnings are errors."""
    printed = warned(**environment)
    assert printed.startswith(f"lpln_autopatch: {line}")
    assert printed.count("did you mean") == 1


@needs_autoload
@pytest.mark.parametrize(
    "environment",
    [
        {"LPLN_SITE": "x", "LPLN_TEST_DIST": "x"},
        {"LPLN_PRECISION": "off", "LPLN_BACKEND": "lean", "LPLN_NORM": "all"},
        {"LPLN_PRECISION": "", "LPLN_BACKEND": "lean"},
        {"LPLN_SUMMARY": "0"},
        {"LPLN_PRECISION": "amp", "LPLN_NORMS": "all"},
    ],
)
def test_other_variables_are_left_alone(environment):
    """A variable that resembles none of ours, and what LPLN_PRECISION switches off, say nothing."""
    assert "did you mean" not in warned(**environment)


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


def test_importing_us_imports_neither_torch_nor_wrapt():
    """`import lpln_autopatch`, and the names that need no torch, are light."""
    code = """
        import sys, lpln_autopatch
        from lpln_autopatch import Precision, enable, low_precision_layernorm
        assert set(lpln_autopatch.__all__) <= set(dir(lpln_autopatch))
        print([name for name in ("torch", "wrapt", "importlib_metadata") if name in sys.modules])
    """
    assert run_python("-c", textwrap.dedent(code), LPLN_PRECISION="amp").stdout == "[]\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_child_processes_inherit(tmp_path, method):
    """Children are lowered, however they are started, and DataLoader's workers too."""
    script = tmp_path / "children.py"
    script.write_text(
        PROGRAM.replace("if __name__", "if 0 and __name__")
        + textwrap.dedent(
            f"""
            class Dataset(torch.utils.data.Dataset):
                def __len__(self):
                    return 2
                def __getitem__(self, index):
                    return dtype()

            if __name__ == "__main__":
                context = torch.multiprocessing.get_context({method!r})
                with context.Pool(1) as pool:
                    print(*pool.map(dtype, [None]))
                loader = torch.utils.data.DataLoader(
                    Dataset(), num_workers=1, multiprocessing_context={method!r}
                )
                print(*{{name for batch in loader for name in batch}})
            """
        )
    )
    environment = ROUTES["sitecustomize"] if not HAS_AUTOLOAD else {}
    result = run_python(str(script), LPLN_PRECISION="amp", **environment)
    assert result.stdout.split() == ["torch.bfloat16"] * 2


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
