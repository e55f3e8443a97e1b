"""torch.compile: output dtype, values, what is compiled how often, and the on-disk cache."""

from __future__ import annotations

import json
import textwrap
import warnings

import pytest
import torch
import wrapt
from compiled import Model
from support import NO_CPP, autocast, needs_dynamo, output_dtype, run_python

import lpln_autopatch as lpln
from lpln_autopatch import NoEffectWarning, _forward, low_precision_layernorm
from lpln_autopatch._torch_compat import TORCH_VERSION

pytestmark = needs_dynamo

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def model():
    return Model()


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
