"""LPLN_PRECISION without a line of code: every route, in processes of their own."""

from __future__ import annotations

import textwrap

import pytest
from routes import HAS_AUTOLOAD, PROGRAM, ROUTES, write_program
from support import run_python


@pytest.fixture
def program(tmp_path):
    return write_program(tmp_path)


@pytest.mark.parametrize("environment", ROUTES.values(), ids=ROUTES)
def test_variable_lowers_an_unchanged_program(program, environment):
    """Each route, and all of them together, lower a program that does not import us."""
    assert run_python(program, **environment).stdout == "torch.float32\n"
    lowered = run_python(program, LPLN_PRECISION="BF16", **environment)
    assert lowered.stdout == "torch.bfloat16\n"


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
