"""Variables of ours that are misspelt, or have no effect by themselves."""

from __future__ import annotations

import pytest
from routes import ROUTES, needs_autoload
from support import run_python


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
