from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings

import pytest
import torch
import wrapt
from support import autocast, exchanged_functions, needs_dynamo, output_dtype

import lpln_autopatch as lpln
from lpln_autopatch import _norms, low_precision_layernorm
from lpln_autopatch._torch_compat import CHECKPOINT_ENTRIES

BF16, FP32 = torch.bfloat16, torch.float32
LayerNorm = torch.nn.LayerNorm


def test_wrapper_is_a_plain_function_that_wrapt_understands():
    """Dynamo ignores a FunctionWrapper on forward: ours is a function with a __wrapped__."""
    original = vars(LayerNorm)["forward"]
    lpln.enable()
    wrapper = vars(LayerNorm)["forward"]
    assert type(wrapper) is types.FunctionType
    assert list(wrapt.wrapper_chain(wrapper)) == [wrapper, original]
    assert inspect.signature(wrapper) == inspect.signature(original)


def plain(original):
    def theirs(self, input):
        return original(self, input) + 1

    return theirs


def with_wraps(original):
    return functools.wraps(original)(plain(original))


def with_wrapt(original):
    return wrapt.FunctionWrapper(original, lambda f, instance, args, kwargs: f(*args, **kwargs) + 1)


@pytest.mark.parametrize("theirs", [plain, with_wraps, with_wrapt])
def test_wrapper_of_somebody_else_on_top_survives(theirs, layer_norm):
    """disable() never overwrites a later patcher: theirs stays, ours is inert; it warns here."""
    original = vars(LayerNorm)["forward"]
    x = torch.randn(4, 8)
    stock = layer_norm(x)
    message = r"LayerNorm\.forward was wrapped by"
    with contextlib.ExitStack() as warned:
        if theirs is not with_wrapt:  # wrapt takes ours out from beneath one of its own
            caught = warned.enter_context(pytest.warns(RuntimeWarning, match=message))
        with lpln.enable():
            LayerNorm.forward = top = theirs(vars(LayerNorm)["forward"])
            assert output_dtype(layer_norm) is BF16
    try:
        if theirs is not with_wrapt:
            assert caught[0].filename == __file__
            lpln.enable()
            with pytest.warns(RuntimeWarning, match=message) as caught:
                lpln.disable()
            assert caught[0].filename == __file__
        assert vars(LayerNorm)["forward"] is top
        assert output_dtype(layer_norm) is FP32
        assert torch.equal(layer_norm(x), stock + 1)
    finally:
        # They leave: what they had wrapped is back, perhaps ours, which can go now.
        if theirs is not with_wrapt:
            LayerNorm.forward = inspect.getclosurevars(top).nonlocals["original"]
            lpln.disable()
            assert vars(LayerNorm)["forward"] is original
        else:
            LayerNorm.forward = original


@pytest.mark.parametrize("theirs", [plain, with_wraps, with_wrapt])
def test_wrapper_of_somebody_else_beneath_is_called(theirs, layer_norm):
    """Theirs runs as it is, and what it calls is lowered: PyTorch's forward."""
    original = vars(LayerNorm)["forward"]
    x = torch.randn(4, 8)
    stock = layer_norm(x)
    LayerNorm.forward = beneath = theirs(original)
    try:
        lpln.enable()
        with autocast():
            assert torch.equal(layer_norm(x), stock.to(BF16) + 1)
            lpln.exempt(layer_norm)
            assert torch.equal(layer_norm(x), stock + 1)
        lpln.disable()
        assert vars(LayerNorm)["forward"] is beneath
    finally:
        LayerNorm.forward = original


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_dynamo)])
@pytest.mark.parametrize("bound", ["class", "instance"])
def test_exemption_holds_without_the_wrapper(layer_norm, bound, compiled):
    """Somebody puts PyTorch's own forward back, or has bound it: lowered, and stock if exempt."""
    original = vars(LayerNorm)["forward"]
    exempt = lpln.exempt(torch.nn.LayerNorm(8))
    if bound == "instance":  # as accelerate's hooks do
        layer_norm.forward, exempt.forward = layer_norm.forward, exempt.forward
    lpln.enable()
    LayerNorm.forward = original
    run = [torch.compile(m, backend="aot_eager") if compiled else m for m in (layer_norm, exempt)]
    assert [output_dtype(module) for module in run] == [BF16, FP32]


class Descriptor:
    """A function of a module that is neither a function nor a partialmethod."""

    def __get__(self, module, owner=None):
        return self if module is None else lambda x: x * 3


FOREIGN = {
    "another norm's": getattr(torch.nn.modules.normalization, "RMSNorm", LayerNorm).forward,
    "partialmethod": functools.partialmethod(lambda self, scale, x: x * scale, 2),
    "descriptor": Descriptor(),
    "torch's, of another class": torch.nn.GELU.forward,
}


@pytest.mark.skipif(not hasattr(torch.nn, "RMSNorm"), reason="needs torch 2.4; CI has it")
@pytest.mark.parametrize("theirs", FOREIGN.values(), ids=FOREIGN)
def test_only_torchs_own_forward_is_replaced(theirs, layer_norm, monkeypatch):
    """A forward of somebody else runs as it is, and disable() gives it back."""
    layer_norm.approximate = "none"  # of GELU
    monkeypatch.setattr(LayerNorm, "forward", theirs)
    x = torch.randn(4, 8)
    expected = layer_norm(x)
    lpln.enable()
    with autocast():
        assert torch.equal(layer_norm(x), expected)
        lpln.exempt(layer_norm)
        assert torch.equal(layer_norm(x), expected)
    assert torch.equal(layer_norm(x), expected)
    lpln.disable()
    assert vars(LayerNorm)["forward"] is theirs


def test_somebody_puts_the_original_back(layer_norm):
    """A patcher that restores what it saved removes our wrapper: lowering goes on."""
    original = vars(LayerNorm)["forward"]
    lpln.enable()
    LayerNorm.forward = original
    assert lpln.status().installed
    assert output_dtype(layer_norm) is BF16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpln.disable()
    assert output_dtype(layer_norm) is FP32


def test_original_class_is_patched_even_if_the_name_was_rebound(layer_norm, monkeypatch):
    """`torch.nn.LayerNorm = Other` changes a name; the instances of the real class are lowered."""

    class Other(torch.nn.Module):
        def forward(self, x):
            return x

    monkeypatch.setattr(torch.nn, "LayerNorm", Other)
    lpln.enable()
    assert output_dtype(layer_norm) is BF16
    assert "forward" in vars(Other)
    assert output_dtype(Other()) is FP32
    monkeypatch.undo()


def test_inactive_process_is_bit_identical(layer_norm):
    """Inert, and after disable(), outputs and gradients are those of an untouched process."""

    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(16, 8, requires_grad=True)
        with autocast():
            y = layer_norm(x)
        return [y, *torch.autograd.grad(y.sum() * 3, [x, *layer_norm.parameters()])]

    def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(s, t) and s.dtype is t.dtype for s, t in zip(a, b, strict=True))

    untouched = run()
    with low_precision_layernorm():
        assert not equal(run(), untouched)
    assert equal(run(), untouched)
    lpln.disable()
    assert equal(run(), untouched)


def test_source_of_our_code_is_found():
    """inspect finds the wrapper's and LPLayerNorm's source, in files named as torch's."""
    source = inspect.getsource(_norms.layer_norm_forward.__code__)
    assert source.startswith("def layer_norm_forward(")
    assert "decide_and_count(request" in inspect.getsource(lpln.LPLayerNorm.forward.__code__)


def test_patcher_that_came_and_went_leaves_no_trace():
    """A closure on top that is taken off again: disable() is silent, and status() right."""
    original = vars(LayerNorm)["forward"]
    lpln.enable()
    saved = LayerNorm.forward
    LayerNorm.forward = plain(saved)
    with low_precision_layernorm("fp32"), low_precision_layernorm():
        pass  # puts one of ours above theirs, and takes it off
    LayerNorm.forward = saved
    lpln.disable()
    assert vars(LayerNorm)["forward"] is original
    assert not lpln.status().installed


def test_disable_is_complete_where_warnings_are_errors():
    """The warning about a wrapper on top comes when everything else has been given back."""
    stock = [function.__code__ for function in exchanged_functions()]
    lpln.enable()
    saved = LayerNorm.forward
    LayerNorm.forward = plain(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            lpln.disable()
    LayerNorm.forward = saved
    assert [function.__code__ for function in exchanged_functions()] == stock


def test_traceback_names_both_files(layer_norm):
    """An error in a lowered call shows PyTorch's function, and ours that it ran."""
    with low_precision_layernorm(), autocast(), pytest.raises(RuntimeError) as error:
        layer_norm(torch.randn(4, 7))
    names = [str(entry.path) for entry in error.traceback]
    at = next(i for i, name in enumerate(names) if name.endswith("functional.py"))
    assert names[at + 1].endswith("lpln_autopatch/_norms.py")


PATCHERS = pytest.mark.parametrize("second", [plain, with_wraps, with_wrapt])


@pytest.mark.parametrize("first", [plain, with_wraps, with_wrapt])
@PATCHERS
def test_patchers_before_and_after_us_stay_in_order(first, second, layer_norm):
    """A patcher before us and one after us are both called, and stay in order after disable().

    When they have left, in the reverse order, LayerNorm.forward is torch's own object again.
    """
    original = vars(LayerNorm)["forward"]
    x = torch.randn(4, 8)
    stock = layer_norm(x)
    LayerNorm.forward = beneath = first(original)
    lpln.enable()
    ours = vars(LayerNorm)["forward"]
    LayerNorm.forward = top = second(ours)
    try:
        with autocast():
            lowered = layer_norm(x)
        assert torch.equal(lowered, stock.to(BF16) + 1 + 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lpln.disable()
        assert vars(LayerNorm)["forward"] is top
        assert torch.equal(layer_norm(x), stock + 1 + 1)
        assert output_dtype(layer_norm) is FP32
        # Only wrapt's own wrapper lets go of what is beneath it.
        spliced_out = second is with_wrapt
        assert [w.category for w in caught] == [RuntimeWarning] * (not spliced_out)
        LayerNorm.forward = beneath if spliced_out else ours
        lpln.disable()
        assert vars(LayerNorm)["forward"] is beneath
        assert not lpln.status().installed
    finally:
        LayerNorm.forward = original


@PATCHERS
def test_patcher_between_two_of_our_activations(second, layer_norm):
    """enable(), theirs, enable(): lowered once, rounded once, and all of it comes off."""
    original = vars(LayerNorm)["forward"]
    x = torch.randn(4, 8)
    stock = layer_norm(x)
    lpln.enable()
    ours = vars(LayerNorm)["forward"]
    LayerNorm.forward = second(ours)
    try:
        lpln.enable("bf16")
        with autocast():
            assert torch.equal(layer_norm(x), stock.to(BF16) + 1)
        assert torch.equal(layer_norm(x), stock + 1)
    finally:
        LayerNorm.forward = ours
        lpln.disable()
    assert vars(LayerNorm)["forward"] is original


@pytest.mark.parametrize("how", ["before", "active"])
def test_patcher_of_checkpointing_is_followed(how):
    """Somebody's wrapper on what checkpoint calls is called, and what it calls remembers."""
    checkpoint = torch.utils.checkpoint
    path = list(CHECKPOINT_ENTRIES)[1]
    *owner, name = path.split(".")
    holder = functools.reduce(getattr, owner, checkpoint)
    original = vars(holder)[name]
    if how == "active":
        lpln.enable()
    calls = []

    def theirs(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    setattr(holder, name, theirs)
    try:
        lpln.enable()
        x = torch.randn(4, 8, requires_grad=True)
        norm, seen = torch.nn.LayerNorm(8), []
        norm.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
        with autocast():
            model = torch.nn.Sequential(norm, torch.nn.Linear(8, 8))
            y = checkpoint.checkpoint(model, x, use_reentrant=False)
        lpln.disable()
        y.sum().backward()
        assert vars(holder)[name] is theirs
    finally:
        setattr(holder, name, original)
    assert seen == [BF16, BF16]
    assert calls == [name]
