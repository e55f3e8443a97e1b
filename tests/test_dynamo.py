"""Dynamo: compiled code follows each switch, and a switch outdates nothing else."""

from __future__ import annotations

import json
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
from compiled import Model, norm_with_pauses
from support import NO_CPP, needs_dynamo, output_dtype, run_forked, run_python

import lpln_autopatch as lpln
from lpln_autopatch import _dynamo, low_precision_layernorm
from lpln_autopatch._torch_compat import TORCH_VERSION

pytestmark = needs_dynamo

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def compile_and_count():
    """torch.compile(fullgraph=True) on a backend that counts compilations."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    return lambda f: torch.compile(f, backend=counter, fullgraph=True), counter


def test_toggling_costs_one_compilation_for_each_variant(model, compile_and_count):
    """on, off, on, off by blocks: two compilations, and the right dtype each time."""
    compile_, counter = compile_and_count
    compiled = compile_(model)
    for _ in range(3):
        with low_precision_layernorm():
            assert output_dtype(compiled) is BF16
        assert output_dtype(compiled) is FP32
    assert counter.frame_count == 2
    with low_precision_layernorm():
        with low_precision_layernorm("fp32"):
            assert output_dtype(compiled) is FP32
        assert output_dtype(compiled) is BF16
    assert counter.frame_count == 2


def test_code_compiled_before_enabling_follows(model, compile_and_count):
    """Code that was compiled before the patch is compiled again, not left stock."""
    compile_, _ = compile_and_count
    compiled = compile_(model)
    assert output_dtype(compiled) is FP32
    with low_precision_layernorm():
        assert output_dtype(compiled) is BF16
    assert output_dtype(compiled) is FP32
    lpln.enable("bf16")
    assert output_dtype(compiled) is BF16
    lpln.disable()
    assert output_dtype(compiled) is FP32
    lpln.enable("amp")
    assert output_dtype(compiled) is BF16


def test_code_that_cannot_follow_is_dropped(model, compile_and_count, monkeypatch):
    """Each change compiles anew before torch 2.5, where compiled code has no guard."""
    from lpln_autopatch import _torch_compat

    monkeypatch.setattr(_torch_compat, "DYNAMO_TRACES_NORMS", False)
    compile_, counter = compile_and_count
    compiled = compile_(model)
    for _ in range(2):
        with low_precision_layernorm():
            assert output_dtype(compiled) is BF16
            with low_precision_layernorm():
                assert output_dtype(compiled) is BF16
    assert counter.frame_count == 2
    lpln.exempt(model)
    with low_precision_layernorm():
        assert output_dtype(compiled) is FP32
    assert counter.frame_count == 3


def test_enabling_again_drops_only_what_could_be_stale(model, compile_and_count):
    """disable(), enable() with nothing compiled between keeps compiled code; else it goes."""
    compile_, counter = compile_and_count
    compiled = compile_(model)
    for _ in range(3):
        lpln.enable()
        assert output_dtype(compiled) is BF16
        lpln.disable()
    assert counter.frame_count == 1
    assert output_dtype(compiled) is FP32
    lpln.enable()
    assert output_dtype(compiled) is BF16
    lpln.disable()
    torch._dynamo.reset()
    assert output_dtype(compiled) is FP32
    lpln.enable()
    assert output_dtype(compiled) is BF16


@pytest.mark.parametrize(
    ("before", "meanwhile"),
    [
        (["enable"], "disable"),
        ([], "enable"),
        (["enable", "disable"], "enable"),
        (["enter"], "leave"),
        (["enter", "leave"], "enter"),
        (["enable amp"], "enable"),
        (["enable group_norm"], "enable"),
        (["enable", "forget"], "disable"),
    ],
)
def test_code_compiled_during_a_later_switch_follows_from_then_on(before, meanwhile):
    """The norm was traced before the switch, and Dynamo makes its guards after it."""
    block = low_precision_layernorm("bf16")
    switch = {
        "enable": lambda: lpln.enable("bf16"),
        "enable amp": lambda: lpln.enable("amp"),
        "enable group_norm": lambda: lpln.enable("bf16", norms="group_norm"),
        "disable": lpln.disable,
        "forget": torch.compiler.reset,  # it also forgets who wants to be told of compilations
        "enter": block.__enter__,
        "leave": lambda: block.__exit__(None, None, None),
    }
    for what in before:
        switch[what]()
    compiled = norm_with_pauses(switch[meanwhile])
    output_dtype(compiled)  # of this call alone, either dtype is right
    assert output_dtype(compiled) is (FP32 if meanwhile in ("disable", "leave") else BF16)
    if meanwhile == "enter":
        switch["leave"]()
    for what in ("disable", "enable", "disable", "enable"):
        switch[what]()
        assert output_dtype(compiled) is {"enable": BF16, "disable": FP32}[what]


def test_module_that_is_exempt_since_it_was_traced_is_stock_at_the_next_call(layer_norm):
    """Another thread exempts it during the compilation."""
    lpln.enable()
    compiled = norm_with_pauses(lambda: lpln.exempt(layer_norm), norm=layer_norm)
    output_dtype(compiled)
    assert output_dtype(compiled) is FP32
    lpln.exempt(layer_norm, False)
    assert output_dtype(compiled) is BF16


@pytest.mark.parametrize("thread", ["the compiling one", "another"])
def test_what_changes_nothing_outdates_nothing(thread):
    """A block of the compile backend, or another thread's block of what is in force already."""
    compilations = []

    def in_a_block():
        with low_precision_layernorm("bf16"):
            pass

    def backend(graph, inputs):
        compilations.append(graph)
        if thread == "another":
            switching = threading.Thread(target=in_a_block)
            switching.start()
            switching.join(60)
        else:
            in_a_block()
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    lpln.enable("bf16" if thread == "another" else "amp")
    compiled = torch.compile(torch.nn.LayerNorm(8), backend=backend)
    assert [output_dtype(compiled) for _ in range(3)] == [BF16] * 3
    assert len(compilations) == 1


def test_code_compiled_behind_another_patchers_function_follows(monkeypatch):
    """A switch of another thread during the compilation is followed through their function."""
    torchs_own = torch.nn.functional.layer_norm

    def theirs(*args, **kwargs):
        return torchs_own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", theirs)
    compiled = norm_with_pauses(lambda: lpln.enable("bf16"))
    output_dtype(compiled)
    assert output_dtype(compiled) is BF16
    lpln.disable()
    assert output_dtype(compiled) is FP32


def test_a_block_of_another_thread_within_a_compilation_leaves_no_trace():
    """Entered before the norm is traced, left before Dynamo makes its guards: stock afterwards."""
    block = low_precision_layernorm("bf16")
    compiled = norm_with_pauses(lambda: block.__exit__(None, None, None), block.__enter__)
    output_dtype(compiled)
    assert output_dtype(compiled) is FP32
    lpln.enable()
    assert output_dtype(compiled) is BF16


guards_on_code = pytest.mark.skipif(
    TORCH_VERSION < (2, 12), reason="docs/pitfalls.md says so; CI runs this on later ones"
)


@guards_on_code
def test_code_compiled_before_the_first_activation_follows():
    """A function that a module holds follows on, off, on in a process that had never activated."""
    code = """
        import sys, torch, lpln_autopatch as lpln
        sys.path.insert(0, sys.argv[1])
        from compiled import HoldsTheFunction

        compiled = torch.compile(HoldsTheFunction(), backend="aot_eager", fullgraph=True)
        def dtype():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return str(compiled(torch.randn(4, 8)).dtype)[6:]

        seen = [dtype()]
        for _ in range(2):
            lpln.enable("bf16")
            seen.append(dtype())
            lpln.disable()
            seen.append(dtype())
        print(*seen)
    """
    result = run_python("-c", textwrap.dedent(code), str(Path(__file__).parent))
    assert result.stdout.split() == ["float32", "bfloat16", "float32", "bfloat16", "float32"]


def test_code_that_cannot_follow_the_first_activation_is_warned_of(model, monkeypatch):
    """A warning comes before torch 2.12, once, and only if code has been compiled."""
    output_dtype(torch.compile(model, backend="eager"))
    with low_precision_layernorm():
        pass
    monkeypatch.setattr(_dynamo, "GRAPHS_GUARD_ON_CODE", False)
    monkeypatch.setattr(_dynamo, "_stock_rules", {})
    with pytest.warns(RuntimeWarning, match=r"torch\.compiler\.reset\(\)"):
        lpln.enable()
    lpln.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpln.enable()
    monkeypatch.undo()
    lpln.disable()
    with low_precision_layernorm():
        pass  # Dynamo has its own rule back


@guards_on_code
@pytest.mark.parametrize("before", ["nothing", "a block", "enable and disable"])
@pytest.mark.parametrize("how", ["compile", "export"])
def test_graphs_made_while_nothing_is_active_name_the_function(before, how):
    """Graphs name PyTorch's function, also after a traced activation: partitioners find it."""
    from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.layer_norm(x.sin(), (8,)) * 2

    model, graphs = Model(), []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph)
    if before == "a block":
        with low_precision_layernorm():
            assert output_dtype(compiled) is BF16
    if before == "enable and disable":
        lpln.enable()
        assert output_dtype(compiled) is BF16
        lpln.disable()
    if how == "compile":
        assert output_dtype(compiled) is FP32
        graph = graphs[-1].graph
    else:
        graph = torch.export.export(model, (torch.randn(4, 8),), strict=True).graph
    assert len(get_source_partitions(graph, [torch.nn.functional.layer_norm])) == 1


PRECOMPILED = """
import json, sys, torch, torch.nn.functional as F, lpln_autopatch
def double(x):
    return F.layer_norm(x, (16,)) * 2
compiled = torch.compile(double, options=json.loads(sys.argv[1]))
def dtype():
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return str(compiled(torch.randn(4, 16)).dtype)[6:]
seen = [dtype()]
torch.compiler.save_cache_artifacts()
if sys.argv[2] == "switch":
    lpln_autopatch.enable()
    seen.append(dtype())
lpln_autopatch.disable()
print(*seen, dtype())
"""


@pytest.mark.skipif(
    TORCH_VERSION < (2, 15),
    reason="torch 2.13 cannot load what it saved itself; CI runs this on 2.15",
)
def test_precompiled_code_is_shared_by_no_lowered_process(tmp_path):
    """TORCH_CACHING_PRECOMPILE keeps no guard: stock and lowered processes, one cache, a switch."""
    script = tmp_path / "precompiled.py"
    script.write_text(PRECOMPILED)
    folder = {
        "TORCH_CACHING_PRECOMPILE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    seen = [
        run_python(str(script), json.dumps(NO_CPP), how, **variables, **folder).stdout.split()
        for how, variables in (
            ("", {}),
            ("", {"LPLN_PRECISION": "amp"}),
            ("switch", {}),
        )
    ]
    low, full = "bfloat16", "float32"
    assert seen == [[full, full], [low, full], [full, low, full]]


def test_first_activation_recompiles_nothing_without_norms():
    """Code that holds no norm is not compiled again, whatever is switched."""
    graphs = []
    run = torch.compile(torch.nn.Linear(8, 8), backend=lambda g, inputs: graphs.append(g) or g)
    run(torch.randn(4, 8))
    for _ in range(3):
        with low_precision_layernorm():
            run(torch.randn(4, 8))
        lpln.disable()
        run(torch.randn(4, 8))
    assert len(graphs) == 1


COMPILED_IN_A_PROCESS = """
import json, sys
import torch
if "late" in sys.argv:
    import torch._dynamo
import lpln_autopatch as lpln
if "lowered" in sys.argv:
    lpln.enable()
if "distributed" in sys.argv:
    import torch._dynamo
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(),
                                         rank=0, world_size=1)
F = torch.nn.functional
torch.manual_seed(0)
norm, linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
def function(x):
    return F.layer_norm(linear(x).float(), (8,))
def module(x):
    return norm(linear(x).float())
# Each by itself: the guards of one would do for the other, too.
options = json.loads(sys.argv[2])
runs = [torch.compile(f, backend=sys.argv[1], fullgraph=True, options=options)
        for f in (function, module)]
def show():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        print(*(str(run(torch.ones(4, 8)).dtype)[6:] for run in runs))
show()
if "toggle" in sys.argv:
    lpln.disable(), show()
    lpln.enable(), show()
    with lpln.low_precision_layernorm("fp32"):
        show()
"""


LOWERED, STOCK = "bfloat16 bfloat16", "float32 float32"


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("group", ["alone", "distributed"])
def test_activation_before_dynamo_is_imported(when, group):
    """Dynamo puts what it finds under torch's names into graphs untraced; ours it traces.

    Also where torch.distributed has it look at the names again.
    """
    arguments = ("aot_eager", "null", "lowered", "toggle", when, group)
    result = run_forked("-c", COMPILED_IN_A_PROCESS, *arguments)
    assert result.stdout.splitlines() == [LOWERED, STOCK, LOWERED, STOCK]


@pytest.mark.parametrize("first", ["lowered", "stock"])
def test_processes_share_a_compile_cache(tmp_path, first):
    """Stock and lowered processes with one cache folder never get each other's code."""
    expected = {"lowered": LOWERED, "stock": STOCK}
    for kind in (first, "stock" if first == "lowered" else "lowered"):
        result = run_python(
            "-c",
            COMPILED_IN_A_PROCESS,
            "inductor",
            json.dumps(NO_CPP),
            kind,
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        )
        assert result.stdout.splitlines() == [expected[kind]]
