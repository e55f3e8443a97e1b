"""LPLN_SUMMARY, in processes of their own: the line at exit."""

from __future__ import annotations

import textwrap

import pytest
from support import needs_dynamo, run_python

PROGRAM = """
import torch
model = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(8))
x = torch.randn(4, 8)
model(x)
with torch.autocast("cpu", dtype=torch.bfloat16):
    for _ in range(3):
        model(x)
    model(x if {plain} else x.as_subclass(type("Sub", (torch.Tensor,), {{}})))
"""
HEAD = "lpln_autopatch: "
TAIL = ". Compiled code is not counted.\n"
# Before torch 2.5 there is no entry point.
ROUTE = {"AUTOWRAPT_BOOTSTRAP": "lpln_autopatch"}


def line(program: str, **environment: str) -> str:
    """What the program prints to stderr at its end, without what every line has."""
    stderr = run_python(
        "-c", textwrap.dedent(program), LPLN_PRECISION="amp", **ROUTE, **environment
    ).stderr
    assert stderr.count("lpln_autopatch") == 1
    assert stderr.endswith(TAIL)
    return stderr[stderr.index(HEAD) + len(HEAD) : -len(TAIL)]


@pytest.mark.parametrize("plain", [True, False])
def test_calls_are_counted_with_their_reasons(plain):
    """Four of five; one that a tensor's class intercepts is one call."""
    assert line(PROGRAM.format(plain=plain), LPLN_SUMMARY="1") == (
        "4 of 5 norm calls in eager mode were lowered; stock: 1 (no autocast)"
    )


def test_calls_of_other_norms_and_exempt_ones_are_counted():
    """With LPLN_NORMS and disable(): what is stock then is no decision of ours."""
    program = """
        import torch, lpln_autopatch
        layer, group = lpln_autopatch.exempt(torch.nn.LayerNorm(8)), torch.nn.GroupNorm(2, 8)
        x = torch.randn(4, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x), group(x), group(x)
            lpln_autopatch.disable()
            layer(x), group(x)
    """
    assert line(program, LPLN_SUMMARY="1", LPLN_NORMS="all") == (
        "2 of 3 norm calls in eager mode were lowered; stock: 1 (exempt)"
    )


@needs_dynamo
def test_compiled_code_is_not_counted_and_compiled_once():
    """Counting makes no difference to compiled code, which is lowered."""
    program = """
        import torch, torch._dynamo.testing
        counter = torch._dynamo.testing.CompileCounter()
        run = torch.compile(torch.nn.Sequential(torch.nn.LayerNorm(8)), backend=counter)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dtypes = {run(torch.randn(4, 8)).dtype for _ in range(3)}
        assert dtypes == {torch.bfloat16}, dtypes
        assert counter.frame_count == 1, counter.frame_count
    """
    assert line(program, LPLN_SUMMARY="1") == "0 of 0 norm calls in eager mode were lowered"


@pytest.mark.parametrize(
    ("precision", "value"), [*(("amp", v) for v in ("", "0", "off")), ("", "1")]
)
def test_nothing_is_printed_unless_it_is_asked_for(precision, value):
    """Off, or without LPLN_PRECISION: no line."""
    program = PROGRAM.format(plain=True)
    result = run_python("-c", program, LPLN_PRECISION=precision, LPLN_SUMMARY=value, **ROUTE)
    assert "norm calls" not in result.stderr
