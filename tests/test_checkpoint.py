"""Activation checkpointing: the recomputation runs in the precision of its forward."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from support import autocast, needs_dynamo

# Bound before anything is patched, as transformers does.
from torch.utils.checkpoint import checkpoint as early_bound_checkpoint

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import CHECKPOINT_RECOMPUTATIONS, TORCH_VERSION
from lpln_autopatch.backends import cpu

BF16, FP32 = torch.bfloat16, torch.float32

both_modes = pytest.mark.parametrize("use_reentrant", [False, True])


class Residual(torch.nn.Sequential):
    """x + layers(x)."""

    def forward(self, x):
        return x + super().forward(x)


class Recorder(torch.nn.Module):
    """Two LayerNorms that get float32, and the dtypes that the first one gave, run after run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        nn = torch.nn
        first = nn.LayerNorm(8)
        self.layers = nn.Sequential(
            Residual(first, nn.Linear(8, 8), nn.GELU()), nn.LayerNorm(8), nn.Linear(8, 8)
        )
        self.dtypes: list[torch.dtype] = []
        # The first one: a recomputation may stop before it reaches the last layers.
        self.hook = first.register_forward_hook(lambda m, a, out: self.dtypes.append(out.dtype))

    def forward(self, x):
        return self.layers(x)


def backward(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of x and the parameters, by `.backward()`, which both modes support."""
    y.float().square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def gradients_without_checkpoint(lower: bool, compiler: str | None = None) -> list[torch.Tensor]:
    """Return the gradients that a checkpointed run must give, eager or compiled."""
    model, x = Recorder(), torch.linspace(-3, 3, 32).view(4, 8).requires_grad_()
    function = torch.compile(model, backend=compiler) if compiler else model
    with low_precision_layernorm() if lower else contextlib.nullcontext(), autocast():
        y = function(x)
    assert compiler or model.dtypes == [BF16 if lower else FP32]
    return backward(model, x, y)


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.fixture
def model():
    return Recorder()


@pytest.fixture
def x():
    return torch.linspace(-3, 3, 32).view(4, 8).requires_grad_()


@both_modes
@pytest.mark.parametrize("after", ["leave", "disable", "other precision"])
def test_backward_after_the_block_recomputes_lowered(model, x, use_reentrant, after):
    """Forward in a block, backward behind it, or after disable(), or in another block."""
    expected = gradients_without_checkpoint(lower=True)
    with low_precision_layernorm("bf16"), autocast():
        y = early_bound_checkpoint(model, x, use_reentrant=use_reentrant)
    assert y.dtype is BF16
    if after == "disable":
        lpln.disable()
    if after == "other precision":
        lpln.enable()
    with (
        low_precision_layernorm("fp32") if after == "other precision" else contextlib.nullcontext()
    ):
        got = backward(model, x, y)
    assert model.dtypes == [BF16, BF16]
    assert equal(got, expected)
    if after == "disable":
        assert not lpln.status().installed
        assert lpln.status().precision is None


@both_modes
@pytest.mark.parametrize("installed", [True, False])
def test_backward_in_a_block_recomputes_stock(model, x, use_reentrant, installed):
    """A forward that ran stock is recomputed stock, even if it was before the first enable()."""
    if not installed and len(CHECKPOINT_RECOMPUTATIONS) < 2 and not use_reentrant:
        pytest.skip("torch < 2.12 has no place to tell; CI runs this on later versions")
    expected = gradients_without_checkpoint(lower=False)
    if installed:
        with low_precision_layernorm():
            pass
    with autocast():
        y = early_bound_checkpoint(model, x, use_reentrant=use_reentrant)
    with low_precision_layernorm("amp"):
        got = backward(model, x, y)
    assert model.dtypes == [FP32, FP32]
    assert equal(got, expected)


@both_modes
def test_enabled_throughout(model, x, use_reentrant):
    """The usual case: on for the whole of training."""
    expected = gradients_without_checkpoint(lower=True)
    lpln.enable()
    with autocast():
        y = early_bound_checkpoint(model, x, use_reentrant=use_reentrant)
    assert equal(backward(model, x, y), expected)
    assert model.dtypes == [BF16, BF16]


@both_modes
def test_state_after_a_recomputation_is_as_before(model, x, use_reentrant):
    """A recomputation leaves the state of the program around it as it found it."""
    with low_precision_layernorm("bf16"), autocast():
        y = early_bound_checkpoint(model, x, use_reentrant=use_reentrant)
    lpln.enable("amp")
    with pytest.warns(lpln.NoEffectWarning):
        lpln.enable("fp32")
    before = lpln.status()
    backward(model, x, y)
    assert lpln.status() == before
    with autocast():
        assert model.layers[0](x).dtype is FP32


@both_modes
def test_failing_recomputation_leaves_nothing_on(model, x, use_reentrant):
    """An exception in the recomputation passes, and its precision goes with it."""
    fail = False

    def function(x):
        if fail:
            raise KeyError("in recomputation")
        return model(x)

    with low_precision_layernorm("bf16"), autocast():
        y = early_bound_checkpoint(function, x, use_reentrant=use_reentrant)
    lpln.disable()
    fail = True
    # torch 1.13's engine turns it into a RuntimeError.
    with pytest.raises((KeyError, RuntimeError), match="in recomputation"):
        backward(model, x, y)
    assert lpln.status().precision is None
    assert not lpln.status().installed


@both_modes
def test_nested_checkpoints(model, x, use_reentrant):
    """A checkpoint inside a checkpoint is carried too."""
    expected = gradients_without_checkpoint(lower=True)

    def outer(x):
        return early_bound_checkpoint(model, x, use_reentrant=use_reentrant)

    with low_precision_layernorm("bf16"), autocast():
        y = early_bound_checkpoint(outer, x, use_reentrant=use_reentrant)
    lpln.disable()
    assert equal(backward(model, x, y), expected)
    assert set(model.dtypes) == {BF16}


@both_modes
def test_backward_in_another_thread(model, x, use_reentrant):
    """The precision is carried with the graph, not with the thread."""
    expected = gradients_without_checkpoint(lower=True)
    with low_precision_layernorm("bf16"), autocast():
        y = early_bound_checkpoint(model, x, use_reentrant=use_reentrant)
    got: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(backward(model, x, y)))
    thread.start()
    thread.join()
    assert equal(got, expected)
    assert model.dtypes == [BF16, BF16]


@pytest.mark.skipif(TORCH_VERSION < (2, 1), reason="the composable API is in torch >= 2.1")
def test_composable_checkpoint(model, x):
    """torch.distributed's composable checkpoint binds torch's internals early: carried too."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    from torch.distributed._composable import checkpoint

    expected = gradients_without_checkpoint(lower=True)
    checkpoint(model.layers)
    with low_precision_layernorm("bf16"), autocast():
        y = model(x)
    lpln.disable()
    assert equal(backward(model, x, y), expected)
    assert model.dtypes == [BF16, BF16]


@pytest.mark.parametrize("segments", [2])
def test_checkpoint_sequential(model, x, segments):
    """checkpoint_sequential goes the same way."""
    expected = gradients_without_checkpoint(lower=True)
    with low_precision_layernorm("bf16"), autocast():
        y = torch.utils.checkpoint.checkpoint_sequential(
            model.layers, segments, x, **({} if TORCH_VERSION < (2, 0) else {"use_reentrant": True})
        )
    assert equal(backward(model, x, y), expected)
    assert model.dtypes == [BF16, BF16]


@needs_dynamo
def test_compiled_model_with_checkpoint_is_lowered(model, x):
    """A recomputation inside compiled code is part of the graph: lowered, after disable() too."""
    expected = gradients_without_checkpoint(lower=True, compiler="aot_eager")
    model.hook.remove()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x):
        return early_bound_checkpoint(model, x, use_reentrant=False)

    with low_precision_layernorm("bf16"), autocast():
        y = function(x)
    lpln.disable()
    assert y.dtype is BF16
    for got, exact in zip(backward(model, x, y), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=0.01, atol=0.01)


@needs_dynamo
def test_checkpoint_around_a_compiled_module(model, x):
    """A compiled module in an eager checkpoint is recomputed in the precision of its forward."""
    expected = gradients_without_checkpoint(lower=True, compiler="eager")
    compiled = torch.compile(model, backend="eager")
    with low_precision_layernorm("bf16"), autocast():
        y = early_bound_checkpoint(compiled, x, use_reentrant=False)
    lpln.disable()
    assert equal(backward(model, x, y), expected)


@both_modes
def test_overlapping_recomputations_do_not_cut_each_other_short(x, use_reentrant):
    """A recomputation that ends while another runs does not take the other's precision away."""
    norm, weight = torch.nn.LayerNorm(8), torch.randn(8, 8, requires_grad=True)
    a_is_in, b_is_in, a_is_done = (threading.Event() for _ in range(3))
    in_backward, dtypes = False, {"a": [], "b": []}

    def function_of(name):
        def function(x):
            if in_backward and name == "a":
                a_is_in.set()
                b_is_in.wait(10)
            elif in_backward:
                b_is_in.set()
                a_is_done.wait(10)
            y = norm(x * 1)
            dtypes[name].append(y.dtype)
            return y.float() @ weight

        return function

    with low_precision_layernorm(), autocast():
        outputs = {
            name: early_bound_checkpoint(function_of(name), x, use_reentrant=use_reentrant)
            for name in dtypes
        }
    in_backward = True

    def run(name):
        if name == "b":
            a_is_in.wait(10)
        outputs[name].float().sum().backward()
        if name == "a":
            a_is_done.set()

    threads = [threading.Thread(target=run, args=(name,)) for name in dtypes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dtypes == {"a": [BF16, BF16], "b": [BF16, BF16]}
    assert lpln.status().precision is None


@both_modes
@pytest.mark.parametrize(("input_dtype", "large"), [(FP32, False), (BF16, False), (BF16, True)])
def test_checkpointing_a_norm_changes_no_bit(use_reentrant, input_dtype, large, monkeypatch):
    """The recorded forward, without gradients, and the recomputation, with them, are one."""
    if large:
        monkeypatch.setattr(cpu, "SMALLEST", 1)
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(768)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    x = (torch.randn(256, 768) * 3 + 5).to(input_dtype).requires_grad_()

    def run(checkpointed):
        x.grad = None
        norm.zero_grad()
        with low_precision_layernorm(), autocast():
            y = (
                early_bound_checkpoint(norm, x, use_reentrant=use_reentrant)
                if checkpointed
                else norm(x)
            )
        y.float().square().sum().backward()
        return [y.detach(), x.grad.clone(), norm.weight.grad.clone(), norm.bias.grad.clone()]

    assert equal(run(True), run(False))


@needs_dynamo
def test_recomputation_after_disable_drops_no_compiled_code(model, x):
    """The wrapper comes back for it, and what was compiled with the wrapper stays good."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model.hook.remove()
    compiled = torch.compile(model, backend=counter)
    with low_precision_layernorm("bf16"), autocast():
        y = early_bound_checkpoint(compiled, x, use_reentrant=True)
        compiled(x)
    before = counter.frame_count
    lpln.disable()
    backward(model, x, y)
    assert counter.frame_count == before


@needs_dynamo
def test_compiled_autograd_recomputes_after_disable(model, x):
    """Dynamo refuses to be reset inside compiled autograd: the recomputation does not ask it to."""
    expected = gradients_without_checkpoint(lower=True)
    with low_precision_layernorm("bf16"), autocast():
        y = early_bound_checkpoint(model, x, use_reentrant=False)
    lpln.disable()
    compiled_autograd = torch._dynamo.compiled_autograd
    enable = getattr(compiled_autograd, "_enable", None) or compiled_autograd.enable  # torch 2.5
    with enable(torch.compile(backend="eager")):
        got = backward(model, x, y)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0.01, atol=0.01)
