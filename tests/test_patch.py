from __future__ import annotations

import functools
import inspect
import types
import warnings
from unittest import mock

import pytest
import torch
import wrapt
from support import autocast, output_dtype

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm, norms
from lpln_autopatch.torch_compat import CHECKPOINT_ENTRIES, CHECKPOINT_RECOMPUTATIONS

BF16, FP32 = torch.bfloat16, torch.float32
LayerNorm = torch.nn.LayerNorm


def patched_attributes() -> list[object]:
    """Everything that the package patches, as it is now."""
    checkpoint_module = torch.utils.checkpoint
    attributes = [vars(LayerNorm)["forward"], torch.nn.functional.layer_norm]
    for path in (*CHECKPOINT_ENTRIES, *CHECKPOINT_RECOMPUTATIONS):
        *owner, name = path.split(".")
        attributes.append(vars(functools.reduce(getattr, owner, checkpoint_module))[name])
    return attributes


def test_disable_restores_the_identical_objects():
    """After disable() every attribute that we patched is the object it was before."""
    before = patched_attributes()
    assert len(before) >= 5
    for _ in range(2):
        lpln.enable()
        lpln.enable("bf16")
        assert not any(a is b for a, b in zip(before, patched_attributes(), strict=True))
        lpln.disable()
        assert all(a is b for a, b in zip(before, patched_attributes(), strict=True))


def test_wrapper_is_a_plain_function_that_wrapt_understands():
    """Dynamo ignores a FunctionWrapper on forward: ours is a function with a __wrapped__."""
    original = vars(LayerNorm)["forward"]
    lpln.enable()
    wrapper = vars(LayerNorm)["forward"]
    assert type(wrapper) is types.FunctionType
    assert list(wrapt.wrapper_chain(wrapper)) == [wrapper, original]
    assert inspect.signature(wrapper) == inspect.signature(original)


def test_block_does_not_patch_again():
    """The wrapper that a block leaves behind is the one that the next block uses."""
    with low_precision_layernorm():
        first = vars(LayerNorm)["forward"]
    with low_precision_layernorm("bf16"):
        assert vars(LayerNorm)["forward"] is first


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
    lpln.enable()
    LayerNorm.forward = top = theirs(vars(LayerNorm)["forward"])
    try:
        assert output_dtype(layer_norm) is BF16
        if theirs is with_wrapt:
            lpln.disable()  # spliced out from beneath theirs
        else:
            message = r"LayerNorm\.forward was wrapped by"
            with pytest.warns(RuntimeWarning, match=message) as caught, lpln.enable():
                pass
            assert caught[0].filename == __file__
            lpln.enable()
            with pytest.warns(RuntimeWarning, match=message) as caught:
                lpln.disable()
            assert caught[0].filename == __file__
        assert vars(LayerNorm)["forward"] is top
        assert output_dtype(layer_norm) is FP32
        assert torch.equal(layer_norm(x), stock + 1)

        lpln.enable()
        assert output_dtype(layer_norm) is BF16
        assert torch.equal(layer_norm(x), stock + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            lpln.disable()
        assert vars(LayerNorm)["forward"] is top
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
    """Ours calls what it found, whoever put it there, and gives it back on disable()."""
    original = vars(LayerNorm)["forward"]
    LayerNorm.forward = beneath = theirs(original)
    try:
        x = torch.randn(4, 8)
        expected = layer_norm(x)
        lpln.enable()
        with autocast():
            lowered = layer_norm(x)
        assert lowered.dtype is BF16
        assert torch.equal(lowered, expected.to(BF16))
        assert torch.equal(layer_norm(x), expected)
        lpln.disable()
        assert vars(LayerNorm)["forward"] is beneath
    finally:
        LayerNorm.forward = original


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
    """Whatever else is there runs as it is: its output is rounded, and disable() gives it back."""
    layer_norm.approximate = "none"  # of GELU
    monkeypatch.setattr(LayerNorm, "forward", theirs)
    x = torch.randn(4, 8)
    expected = layer_norm(x)
    lpln.enable()
    with autocast():
        lowered = layer_norm(x)
        assert torch.equal(lowered, expected.to(BF16))
        lpln.exempt(layer_norm)
        assert torch.equal(layer_norm(x), expected)
    assert torch.equal(layer_norm(x), expected)
    lpln.disable()
    assert vars(LayerNorm)["forward"] is theirs


def test_enable_after_somebody_put_the_original_back(layer_norm):
    """A patcher that restores what it saved removes ours: the next enable() puts it on again."""
    original = vars(LayerNorm)["forward"]
    lpln.enable()
    LayerNorm.forward = original
    assert not lpln.status().installed
    lpln.enable()
    assert output_dtype(layer_norm) is BF16
    lpln.disable()
    LayerNorm.forward = original
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpln.disable()


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


def test_source_of_a_wrapper_is_found():
    """By inspect, under the file name that begins with torch's: of code, frames and LPLayerNorm."""
    source = inspect.getsource(inspect.getmodule(norms.Target))
    for target in norms.TARGETS:
        code = inspect.getsource(target.wrapper.__code__)
        assert code.startswith(f"def {target.wrapper.__code__.co_name}(")
        assert code in source
    assert "decide(lowering" in inspect.getsource(lpln.LPLayerNorm.forward.__code__)
    torchs = inspect.getsource(torch.nn.functional.layer_norm)
    lpln.enable()
    assert inspect.getsource(torch.nn.functional.layer_norm) == torchs
    with pytest.raises(RuntimeError) as error:
        torch.nn.functional.layer_norm(torch.randn(2, 3), (4,))
    _, ours, *_ = inspect.getinnerframes(error.tb)
    assert "_layer_norm(" in ours.code_context[0]


def test_patcher_that_came_and_went_leaves_no_trace():
    """A closure on top that is taken off again: disable() is silent, and status() right."""
    original = vars(LayerNorm)["forward"]
    lpln.enable()
    saved = LayerNorm.forward
    LayerNorm.forward = plain(saved)
    with low_precision_layernorm():
        pass  # puts one of ours above theirs
    LayerNorm.forward = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpln.disable()
        assert vars(LayerNorm)["forward"] is original
        assert not lpln.status().installed
        lpln.disable()


def test_disable_is_complete_where_warnings_are_errors():
    """The warning about a wrapper on top comes when everything else has been taken off."""
    before = patched_attributes()
    lpln.enable()
    saved = LayerNorm.forward
    LayerNorm.forward = plain(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            lpln.disable()
    assert all(a is b for a, b in zip(before[1:], patched_attributes()[1:], strict=True))
    LayerNorm.forward = saved


def test_traceback_names_both_files(layer_norm):
    """An error in a lowered call shows that our function ran in the place of torch's."""
    with low_precision_layernorm(), autocast(), pytest.raises(RuntimeError) as error:
        layer_norm(torch.randn(4, 7))
    names = [str(entry.path) for entry in error.traceback]
    assert any("functional.py <- " in n and n.endswith("norms.py") for n in names)


PATCHERS = pytest.mark.parametrize("second", [plain, with_wraps, with_wrapt])


@pytest.mark.parametrize("first", [plain, with_wraps, with_wrapt])
@PATCHERS
def test_between_two_patchers(first, second, layer_norm):
    """One before us and one after us: both are called, disable() leaves both, in their order.

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
        assert lowered.dtype is BF16
        assert torch.equal(lowered, (stock + 1).to(BF16) + 1)
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
            # A closure hides ours, so that there is another one above it.
            expected = (stock + 1).to(BF16) if second is plain else stock.to(BF16) + 1
            assert torch.equal(layer_norm(x), expected)
        assert torch.equal(layer_norm(x), stock + 1)
    finally:
        LayerNorm.forward = ours
        lpln.disable()
    assert vars(LayerNorm)["forward"] is original


def test_patcher_of_checkpoint_is_left_in_place():
    """Somebody's wrapper on what checkpoint calls stays above ours, and disable() warns of it.

    A backward after that recomputes, and warns of nothing.
    """
    checkpoint = torch.utils.checkpoint
    path = list(CHECKPOINT_ENTRIES)[1]
    *owner, name = path.split(".")
    holder = functools.reduce(getattr, owner, checkpoint)
    original = vars(holder)[name]
    lpln.enable()
    ours = vars(holder)[name]
    calls = []

    def theirs(*args, **kwargs):
        calls.append(name)
        return ours(*args, **kwargs) if not owner else ours.__get__(args[0])(*args[1:], **kwargs)

    setattr(holder, name, theirs)
    try:
        with pytest.warns(RuntimeWarning, match=rf"checkpoint\.{path} was wrapped by"):
            lpln.disable()
        assert vars(holder)[name] is theirs
        x = torch.randn(4, 8, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = checkpoint.checkpoint(torch.nn.LayerNorm(8), x, use_reentrant=False)
            y.sum().backward()
        assert x.grad is not None
        assert calls == [name]
    finally:
        setattr(holder, name, ours)
        lpln.disable()
    assert vars(holder)[name] is original


@pytest.mark.parametrize("name", ["forward", "layer_norm"])
def test_mock_around_an_activation_is_seen(layer_norm, name):
    """mock.patch puts the original back over our wrapper: status() says so, disable() is silent.

    The next enable() lowers again.
    """
    holder = LayerNorm if name == "forward" else torch.nn.functional
    original = vars(holder)[name]
    with mock.patch.object(holder, name, lambda *args, **kwargs: args[-1]):
        lpln.enable()
    assert vars(holder)[name] is original
    assert not lpln.status().installed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpln.disable()
        lpln.enable()
        assert lpln.status().installed
        assert output_dtype(layer_norm) is BF16
        lpln.disable()
    assert vars(holder)[name] is original
