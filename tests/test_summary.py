"""The line at exit, with LPLN_SUMMARY and without, in processes of their own."""

from __future__ import annotations

import os
import re
import textwrap

import pytest
from hand_written_norms import needs_hand_written
from support import needs_dynamo, run_python

from lpln_autopatch._torch_compat import TORCH_VERSION

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
HEAD = r"lpln_autopatch, process \d+: "
TAIL = ". Compiled code is not counted."
# Before torch 2.5 there is no entry point.
ROUTE = {"AUTOWRAPT_BOOTSTRAP": "lpln_autopatch"}


def line(program: str, **environment: str) -> str:
    """Return the line that the program prints to stderr at its end, without its usual start."""
    (printed,) = lines(program, LPLN_SUMMARY="1", **environment)
    assert printed.endswith(TAIL)
    return printed.removesuffix(TAIL)


def lines(program: str, **environment: str) -> list[str]:
    """Return our lines at the end of the program, without the name of the process."""
    environment = {"LPLN_PRECISION": "amp", **ROUTE, **environment}
    stderr = run_python("-c", textwrap.dedent(program), **environment).stderr
    ours = [line for line in stderr.splitlines() if "lpln_autopatch" in line]
    heads = [re.match(HEAD, line) for line in ours]
    assert all(heads), stderr
    return [line[head.end() :] for line, head in zip(ours, heads, strict=True)]


@pytest.mark.parametrize("plain", [True, False])
def test_calls_are_counted_with_their_reasons(plain):
    """Four of five calls are lowered; a call that a tensor's class intercepts counts once."""
    assert line(PROGRAM.format(plain=plain)) == (
        "4 of 5 norm calls in eager mode were lowered; stock: 1 (no autocast)"
    )


def test_calls_of_other_norms_and_exempt_ones_are_counted():
    """Calls are counted with LPLN_NORMS; after disable() no call is decided, and none counts."""
    program = """
        import torch, lpln_autopatch
        layer, group = lpln_autopatch.exempt(torch.nn.LayerNorm(8)), torch.nn.GroupNorm(2, 8)
        x = torch.randn(4, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x), group(x), group(x)
            lpln_autopatch.disable()
            layer(x), group(x)
    """
    assert line(program, LPLN_NORMS="all") == (
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
    assert line(program) == "0 of 0 norm calls in eager mode were lowered"


@pytest.mark.parametrize(
    ("precision", "value"), [*(("amp", v) for v in ("", "0", "off")), ("off", "1")]
)
def test_nothing_is_printed_unless_it_is_asked_for(precision, value):
    """No line is printed if a call was lowered, or without LPLN_PRECISION."""
    program = PROGRAM.format(plain=True)
    assert lines(program, LPLN_PRECISION=precision, LPLN_SUMMARY=value) == []


NONE_LOWERED = """
import torch
model = torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(8))
for _ in range(5):
    model(torch.randn(4, 8))
with torch.autocast("cpu", dtype=torch.bfloat16):
    model.double()(torch.randn(4, 8).double())
"""


def test_norms_of_which_none_was_lowered_are_a_line():
    """The line has the number and the most frequent reason, without LPLN_SUMMARY."""
    assert lines(NONE_LOWERED) == ["6 norm calls, none lowered: no autocast."]
    one = "import torch; torch.nn.LayerNorm(8)(torch.randn(4, 8))"
    assert lines(one) == ["1 norm call, none lowered: no autocast."]


NOT_ASKED_FOR = """
import torch
class LlamaRMSNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
model = torch.nn.Sequential(LlamaRMSNorm(), torch.nn.GroupNorm(2, 8))
unfinished = LlamaRMSNorm.__new__(LlamaRMSNorm)
if {trains}:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(4, 8)).sum().backward()
"""


@pytest.mark.skipif(TORCH_VERSION < (2, 4), reason="no norms by hand there; CI runs later ones")
def test_norms_that_nobody_asked_for_are_a_line():
    """Other norms that were trained are named if none was lowered, but not with LPLN_NORMS=all."""
    program = NOT_ASKED_FOR.format(trains=True)
    assert lines(program) == [
        "no norm was lowered: LPLN_NORMS=layer_norm leaves 2 modules (GroupNorm, LlamaRMSNorm) "
        "stock; try LPLN_NORMS=all."
    ]
    assert lines(program, LPLN_NORMS="all") == []
    assert lines(NOT_ASKED_FOR.format(trains=False)) == []


@pytest.mark.skipif(TORCH_VERSION < (2, 4), reason="no norms by hand there; CI runs later ones")
def test_norms_by_hand_are_counted():
    """A call of each that is recognised, lowered or not; a trial is no call."""
    program = NOT_ASKED_FOR.format(trains=True) + "model(torch.randn(4, 8))"
    assert line(program, LPLN_NORMS="all") == (
        "2 of 4 norm calls in eager mode were lowered; stock: 2 (no autocast)"
    )


@needs_dynamo
@pytest.mark.parametrize("autocast", [True, False])
def test_compiled_norms_of_which_none_was_lowered_are_a_line(autocast):
    """Dynamo's decisions count for that: nothing is said of compiled code that is lowered."""
    program = f"""
        import torch
        run = torch.compile(torch.nn.LayerNorm(8), backend="eager", fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled={autocast}):
            print(run(torch.randn(4, 8)).dtype)
    """
    expected = ["norms ran in compiled code alone, none lowered: no autocast."]
    assert lines(program) == ([] if autocast else expected)


def test_counting_ends_with_the_first_lowered_call():
    """The first lowered call ends the counting, unless LPLN_SUMMARY wants all calls."""
    program = """
        import torch
        from lpln_autopatch import _forward
        norm, x = torch.nn.LayerNorm(8), torch.randn(4, 8)
        norm(x)
        assert _forward.counter is not None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            norm(x)
        assert _forward.counter is None
    """
    assert lines(program) == []


@pytest.mark.parametrize("summary", ["", "1"])
def test_process_without_norms_prints_nothing(summary):
    """A process without norms, as torchrun's parent or a loader's worker, prints no line."""
    assert lines("import torch; torch.nn.LayerNorm(8)", LPLN_SUMMARY=summary) == []


def test_surgery_is_counted():
    """A module of its own precision is no other norm."""
    program = """
        import torch, lpln_autopatch
        norm = torch.nn.LayerNorm(8)
        lpln_autopatch.apply_low_precision_layernorm(norm)
        norm(torch.randn(4, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            norm(torch.randn(4, 8))
    """
    expected = "1 of 2 norm calls in eager mode were lowered; stock: 1 (no autocast)"
    assert line(program) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX has fork; CI has it")
def test_forked_child_counts_its_own():
    """Parent and child have a line each, and the child's has not the parent's calls."""
    program = f"{NONE_LOWERED}\nimport os\nif os.fork() == 0:\n    model.float()(torch.randn(4, 8))"
    program += "\nelse:\n    os.wait()\n"
    assert lines(program) == [
        "1 norm call, none lowered: no autocast.",
        "6 norm calls, none lowered: no autocast.",
    ]


def test_rank_is_named():
    """The line names the rank that a launcher has given the process."""
    stderr = run_python("-c", NONE_LOWERED, LPLN_PRECISION="amp", RANK="3", **ROUTE).stderr
    assert stderr.endswith("lpln_autopatch, rank 3: 6 norm calls, none lowered: no autocast.\n")


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="LPLN_EXEMPT needs torch 2.0; CI has later ones")
def test_name_that_matched_no_module_is_named():
    """LPLN_EXEMPT is checked against the modules that were made, under LPLN_SUMMARY."""
    program = PROGRAM.format(plain=True)
    names = {"LPLN_EXEMPT": "1,head.norm,*.tail"}
    assert lines(program, LPLN_SUMMARY="1", **names)[1:] == [
        "LPLN_EXEMPT: no module is called head.norm, tail."
    ]
    assert lines(program, LPLN_SUMMARY="1", LPLN_EXEMPT="1")[1:] == []


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="LPLN_EXEMPT needs torch 2.0; CI has later ones")
def test_name_inside_an_exempt_module_has_matched():
    """A module added to an exempt module is exempt, and its own name counts as found."""
    program = """
        import torch
        model = torch.nn.Module()
        model.head = torch.nn.Module()
        model.head.norm = torch.nn.LayerNorm(8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.head.norm(torch.randn(4, 8))
    """
    assert line(program, LPLN_EXEMPT="head,head.norm") == (
        "0 of 1 norm calls in eager mode were lowered; stock: 1 (exempt)"
    )


@needs_hand_written
def test_norms_that_are_left_out_are_named():
    """Under LPLN_SUMMARY a trained norm outside of LPLN_NORMS has a line beside the counts."""
    program = """
        import torch
        model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.RMSNorm(8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(4, 8)).sum().backward()
    """
    counts, others = lines(program, LPLN_SUMMARY="1")
    assert counts.startswith("1 of 1 norm calls")
    assert others == ("LPLN_NORMS=layer_norm leaves 1 module (RMSNorm) stock; try LPLN_NORMS=all.")


@needs_hand_written
def test_no_norm_is_named_where_autocast_is_off():
    """Without autocast LPLN_NORMS=all would lower no norm: only the reason is said."""
    program = """
        import torch
        model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.RMSNorm(8))
        model(torch.randn(4, 8)).sum().backward()
    """
    assert lines(program) == ["1 norm call, none lowered: no autocast."]


@needs_hand_written
def test_exempt_hand_written_norm_is_counted():
    """A call of an exempt hand-written norm is stock, with that reason."""
    program = """
        import torch
        class LlamaRMSNorm(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(8))
            def forward(self, x):
                return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.Sequential(LlamaRMSNorm(), torch.nn.LayerNorm(8))(torch.randn(4, 8))
    """
    expected = "1 of 2 norm calls in eager mode were lowered; stock: 1 (exempt)"
    assert line(program, LPLN_NORMS="all", LPLN_EXEMPT="LlamaRMSNorm") == expected
