"""torch.compile: output dtype, values, what is compiled how often, and the on-disk cache."""

from __future__ import annotations

import json
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
import wrapt
from support import NO_CPP, autocast, needs_dynamo, output_dtype, run_python

import lpln_autopatch as lpln
from lpln_autopatch import NoEffectWarning, _dynamo, _forward, low_precision_layernorm
from lpln_autopatch._torch_compat import TORCH_VERSION

pytestmark = needs_dynamo

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Model(torch.nn.Module):
    """A LayerNorm that gets float32, between other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x.sin()) * 2


@pytest.fixture
def model():
    """A model whose LayerNorm has parameters that are not ones and zeros."""
    model = Model()
    torch.nn.init.normal_(model.norm.weight, 1.0, 0.2)
    torch.nn.init.normal_(model.norm.bias, 0.0, 0.2)
    return model


@pytest.fixture
def compile_and_count():
    """torch.compile(fullgraph=True) on a backend that counts compilations."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    return lambda f: torch.compile(f, backend=counter, fullgraph=True), counter


def run(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    with autocast():
        y = model(x)
    parameters = list(getattr(model, "_orig_mod", model).parameters())
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


@pytest.mark.parametrize("compile_first", [False, True])
@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_compiled_equals_eager(model, compile_first, input_dtype):
    """Inductor's code gives eager's dtypes, values and gradients, whenever it was compiled."""
    x = torch.randn(4, 8).to(input_dtype)
    compiled = torch.compile(model, fullgraph=True)
    if compile_first:
        assert run(compiled, x)[0].dtype is input_dtype
    lpln.enable()
    for got, expected in zip(run(compiled, x), run(model, x), strict=True):
        assert got.dtype is expected.dtype
        # Inductor does not round between fused operations: closer than eager, not equal to it.
        assert (got - expected).float().norm() < 0.02 * expected.float().norm()
    assert run(compiled, x)[0].dtype is BF16
    lpln.disable()
    assert run(compiled, x)[0].dtype is input_dtype


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


def test_compiled_layernorm_by_itself(layer_norm):
    """A LayerNorm that is the compiled module: compiled before, in and after a block."""
    compiled = torch.compile(layer_norm, fullgraph=True, backend="eager")
    assert output_dtype(compiled) is FP32
    with low_precision_layernorm():
        assert output_dtype(compiled) is BF16
        inside = torch.compile(layer_norm, fullgraph=True, backend="eager")
        assert output_dtype(inside) is BF16
    assert output_dtype(compiled) is FP32
    assert output_dtype(inside) is FP32


def test_exception_in_a_compiled_lowered_forward(layer_norm):
    """A wrong shape fails in compiled code too, and the next call is lowered."""
    compiled = torch.compile(layer_norm, backend="eager")
    with low_precision_layernorm("bf16"), autocast():
        with pytest.raises(RuntimeError, match="normalized_shape"):
            compiled(torch.randn(4, 7))
        assert compiled(torch.randn(4, 8)).dtype is BF16
    assert output_dtype(compiled) is FP32


def test_autocast_inside_the_compiled_function(model):
    """Regions of autocast in the graph count as they do in eager mode."""

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        with autocast():
            lowered = model(x)
            with autocast(enabled=False):
                stock = model(x)
        return lowered, stock, model(x)

    with low_precision_layernorm():
        assert [y.dtype for y in function(torch.randn(4, 8))] == [BF16, FP32, FP32]


def test_exempt_after_compiling_is_followed(model):
    """The mark is guarded: exempting, and its undoing, reach compiled code."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    lpln.enable()
    for _ in range(2):
        assert output_dtype(compiled) is BF16
        lpln.exempt(model)
        assert output_dtype(compiled) is FP32
        lpln.exempt(model, False)


def test_float64_and_other_dtypes(model):
    """Compiled code too leaves float64 stock, and rounds once where dtypes differ."""
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(64, 8, dtype=BF16)
    with low_precision_layernorm():
        with autocast(FP16):
            y = compiled(x)
        assert y.dtype is FP16
        exact = model.double()(x.double())
        assert ((y - exact).norm() / exact.norm()) < 2 * torch.finfo(BF16).eps
        assert output_dtype(torch.compile(model, fullgraph=True), x.double()) is torch.float64


def test_warning_that_is_an_error_is_logged_while_compiling(model, caplog):
    """A warning that is an error cannot pass Dynamo: it is logged, and the code is stock."""
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with warnings.catch_warnings(), low_precision_layernorm("amp_fp16"):
        warnings.simplefilter("error", NoEffectWarning)
        assert output_dtype(compiled) is FP32
        assert "amp_fp16" in caplog.text
        _forward._warned.clear()
        with pytest.raises(NoEffectWarning, match="amp_fp16"):
            output_dtype(model)


def test_autocast_of_the_other_dtype_warns_from_compiled_code(model):
    """The warning comes once, at compilation, without a graph break."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    lpln.enable("amp_fp16")
    with pytest.warns(NoEffectWarning, match="amp_fp16"):
        assert output_dtype(compiled) is FP32
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        assert output_dtype(compiled) is FP32


def test_block_inside_compiled_code_is_correct(model):
    """A block in a compiled function is obeyed (it breaks the graph: put it around instead)."""

    @torch.compile(backend="eager")
    def function(x):
        with low_precision_layernorm("bf16"):
            lowered = model(x)
        return lowered, model(x)

    with autocast():
        for _ in range(2):
            assert [y.dtype for y in function(torch.randn(4, 8))] == [BF16, FP32]
    assert lpln.status().precision is None


def test_decorated_function_can_be_compiled(model):
    """A decorated function under torch.compile lowers inside, and only there."""

    @torch.compile(backend="eager")
    @low_precision_layernorm("bf16")
    def function(x):
        return model(x)

    assert output_dtype(function) is BF16
    assert output_dtype(model) is FP32
    assert lpln.status().precision is None


def test_wrapper_of_somebody_else_beneath_is_compiled(model):
    """A foreign forward beneath ours is traced, and PyTorch's, which it calls, is lowered."""
    original = vars(torch.nn.LayerNorm)["forward"]
    torch.nn.LayerNorm.forward = lambda self, x: original(self, x) + 1
    try:
        compiled = torch.compile(model, fullgraph=True)
        x = torch.randn(4, 8)
        expected = model(x)
        with low_precision_layernorm(), autocast():
            got = compiled(x)
        assert got.dtype is BF16
        torch.testing.assert_close(got, expected.to(BF16), rtol=0.02, atol=0.02)
        lpln.disable()
    finally:
        torch.nn.LayerNorm.forward = original


@pytest.mark.parametrize("fullgraph", [False, True])
def test_function_wrapper_of_somebody_else_above_is_looked_through(model, fullgraph, monkeypatch):
    """Dynamo runs what a wrapt.FunctionWrapper wraps: ours, lowered and stock, without an error."""
    x = torch.randn(4, 8)
    stock = model(x)
    lpln.enable()
    wrapper = wrapt.FunctionWrapper(
        vars(torch.nn.LayerNorm)["forward"],
        lambda f, instance, args, kwargs: f(*args, **kwargs) + 1,
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.LayerNorm, "forward", wrapper)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        assert output_dtype(compiled, x) is BF16
        torch.testing.assert_close(compiled(x), stock)


def test_only_input_and_statistics_are_saved_for_backward():
    """Compiled, the lowered norm saves what the stock one does: x in its own dtype."""
    norm = torch.nn.LayerNorm(256)
    x = torch.randn(64, 256, dtype=BF16, requires_grad=True)

    def saved_bytes() -> int:
        torch._dynamo.reset()
        sizes: dict[int, int] = {}
        compiled = torch.compile(lambda x: norm(x) * 1, fullgraph=True)
        with autocast():
            compiled(x)  # compiled outside of the hooks, which it would otherwise trace
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
            ):
                compiled(x)
        return sum(sizes.values())

    with low_precision_layernorm():
        parameters, statistics = 2 * 256 * 4, 2 * 64 * 4
        assert 0 < saved_bytes() <= x.nbytes + parameters + statistics


@pytest.mark.skipif(TORCH_VERSION < (2, 6), reason="the cache is on by default in torch >= 2.6")
def test_second_process_hits_the_aot_autograd_cache(tmp_path):
    """The next process compiles nothing anew, with autocast around the compiled model."""
    script = tmp_path / "cached.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys, torch, torch._dynamo.utils, lpln_autopatch
            from torch import nn
            model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
            model = torch.compile(model, fullgraph=True, options=json.loads(sys.argv[1]))
            lpln_autopatch.enable()
            with torch.autocast("cpu", dtype=torch.float16):
                y = model(torch.randn(4, 8, requires_grad=True))
            assert y.dtype is torch.float16
            y.float().sum().backward()
            print(json.dumps(torch._dynamo.utils.counters["aot_autograd"]))
            """
        )
    )
    counters = [
        json.loads(
            run_python(
                str(script),
                json.dumps(NO_CPP),
                TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
                TORCHINDUCTOR_FX_GRAPH_CACHE="1",
                TORCHINDUCTOR_AUTOGRAD_CACHE="1",
            ).stdout
        )
        for _ in range(2)
    ]
    assert counters[0].get("autograd_cache_miss") == 1
    assert counters[1].get("autograd_cache_hit") == 1
    assert "autograd_cache_bypass" not in counters[0]


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


class BreaksTheGraph(torch.nn.Module):
    """Calls many LayerNorms from frames that Dynamo cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(64) for _ in range(12))

    def forward(self, x):
        for norm in self.norms:
            torch._dynamo.graph_break()
            x = norm(x) * 3
        return x


def test_behind_a_graph_break_nothing_is_compiled_that_stock_does_not():
    """Dynamo skips torch.nn's own forward there, and skips ours: inert is bit-identical."""
    from torch._dynamo.testing import CompileCounter

    def frames_and_output(enter):
        torch._dynamo.reset()
        counter = CompileCounter()
        with enter, autocast():
            y = torch.compile(model, backend=counter)(x)
        with enter, autocast():
            inductor = torch.compile(model)(x)
        return counter.frame_count, y, inductor

    import contextlib

    model, x = BreaksTheGraph(), torch.randn(64, 64) * 3 + 2
    frames, stock, stock_inductor = frames_and_output(contextlib.nullcontext())
    with low_precision_layernorm():
        pass
    inert_frames, inert, inert_inductor = frames_and_output(contextlib.nullcontext())
    assert inert_frames == frames
    assert torch.equal(inert, stock)
    assert torch.equal(inert_inductor, stock_inductor)
    lowered_frames, lowered, _ = frames_and_output(low_precision_layernorm())
    assert lowered_frames == frames
    assert lowered.dtype is BF16


def test_compiled_layernorm_by_itself_survives_disable(layer_norm):
    """A LayerNorm compiled by itself while enabled still runs with fullgraph after disable()."""
    lpln.enable()
    compiled = torch.compile(layer_norm, fullgraph=True, backend="eager")
    assert output_dtype(compiled) is BF16
    lpln.disable()
    assert output_dtype(compiled) is FP32
    lpln.enable()
    assert output_dtype(compiled) is BF16


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


def norm_with_pauses(in_the_backend, before_the_norm=None, norm=None):
    """A compiled norm. While it is first compiled, another thread runs what is given."""
    pauses = {"backend": in_the_backend, "trace": before_the_norm}
    norm = norm or torch.nn.LayerNorm(8)

    @torch._dynamo.assume_constant_result
    def pause(where: str) -> None:
        function = pauses.pop(where, None)
        if function is not None:
            thread = threading.Thread(target=function)
            thread.start()
            thread.join(60)

    def backend(graph, inputs):
        pause("backend")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def call(x):
        pause("trace")
        return norm(x)

    return torch.compile(call, backend=backend)


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


class HoldsTheFunction(torch.nn.Module):
    """PyTorch's function itself is an attribute, as quantisers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.op = torch.nn.functional.layer_norm

    def forward(self, x):
        return self.op(x.sin(), (8,)) * 2


@guards_on_code
def test_code_compiled_before_the_first_activation_follows():
    """A function that a module holds follows on, off, on in a process that had never activated."""
    code = """
        import sys, torch, lpln_autopatch as lpln
        sys.path.insert(0, sys.argv[1])
        from test_compile import HoldsTheFunction

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
