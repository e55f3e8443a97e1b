from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings

import pytest
import torch
from support import AUTOCAST_DTYPES, autocast, output_dtype

import lpln_autopatch as lpln
from lpln_autopatch import NoEffectWarning, low_precision_layernorm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_enable_lowers_until_disable(layer_norm):
    """enable() lowers every instance, earlier or later; disable() ends it."""
    assert output_dtype(layer_norm) is FP32
    lpln.enable()
    assert output_dtype(layer_norm) is BF16
    assert output_dtype(torch.nn.LayerNorm(8)) is BF16
    lpln.disable()
    assert output_dtype(layer_norm) is FP32


def test_disable_twice_does_nothing_more():
    """disable() without anything to undo is silent."""
    lpln.disable()
    lpln.disable()


def test_block_lowers_inside_only(layer_norm):
    """A block lowers inside, and leaves nothing of ours in PyTorch's functions."""
    with low_precision_layernorm("bf16"):
        assert output_dtype(layer_norm) is BF16
        assert lpln.status().installed
    assert output_dtype(layer_norm) is FP32
    assert not lpln.status().installed


@pytest.mark.parametrize("before", [None, "amp"])
def test_enable_may_be_used_as_a_block(layer_norm, before):
    """`with enable():` gives back at its end what was the base before, whatever raises."""
    if before:
        lpln.enable(before)
    status = lpln.status()

    def run() -> None:
        with lpln.enable("bf16"):
            assert str(lpln.status().precision) == "amp_bf16"
            assert output_dtype(layer_norm) is BF16
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        run()
    assert lpln.status() == status
    assert output_dtype(layer_norm) is (BF16 if before else FP32)


def test_block_ends_with_an_exception(layer_norm):
    """An exception closes the block and is not swallowed."""
    with pytest.raises(KeyError), low_precision_layernorm():
        raise KeyError
    assert output_dtype(layer_norm) is FP32


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_behind_a_lowered_call_leaves_nothing_on(layer_norm, error):
    """An error between forward and the end of a block, Ctrl-C included, closes the block."""

    def interrupt(*arguments: object) -> None:
        raise error

    handle = layer_norm.register_forward_hook(interrupt)
    with pytest.raises(error), low_precision_layernorm("bf16"), autocast():
        layer_norm(torch.randn(4, 8))
    handle.remove()
    assert lpln.status().precision is None
    assert output_dtype(layer_norm) is FP32


def test_one_instance_can_be_entered_again(layer_norm):
    """An instance is reusable and reentrant, like torch.autocast."""
    block = low_precision_layernorm()
    for _ in range(2):
        with block:
            with block:
                pass
            assert output_dtype(layer_norm) is BF16
        assert output_dtype(layer_norm) is FP32


def test_block_decorates_a_function(layer_norm):
    """A block as a decorator lowers inside the function, recursion included."""

    @low_precision_layernorm("bf16")
    def run(depth: int = 1) -> torch.dtype:
        """Doc."""
        return run(depth - 1) if depth else output_dtype(layer_norm)

    assert run() is BF16
    assert run.__doc__ == "Doc."
    assert output_dtype(layer_norm) is FP32


def test_block_refuses_to_decorate_what_runs_later():
    """A generator or coroutine, whose body would run after the block closed, is a TypeError."""

    def generator():
        yield

    async def coroutine():
        pass

    async def async_generator():
        yield

    for function in (generator, coroutine, async_generator):
        with pytest.raises(TypeError, match="with"):
            low_precision_layernorm()(function)


def test_decorator_without_parentheses_is_explained():
    """@low_precision_layernorm, without (), says what is missing."""
    with pytest.raises(TypeError, match="needs parentheses"):

        @low_precision_layernorm
        def function():
            pass


def test_block_refuses_to_decorate_a_class_or_a_module(layer_norm):
    """A class, with or without parentheses, and a module: a TypeError that says what to do."""
    with pytest.raises(TypeError, match="Decorate its `forward`"):
        low_precision_layernorm("bf16")(torch.nn.LayerNorm)
    with pytest.raises(TypeError, match="needs parentheses"):
        low_precision_layernorm(torch.nn.LayerNorm)
    with pytest.raises(TypeError, match=r"with.*apply_low_precision_layernorm"):
        low_precision_layernorm("bf16")(layer_norm)


@pytest.mark.parametrize("decorated", [3, None, "bf16", classmethod(print)])
def test_block_refuses_to_decorate_what_cannot_be_called(decorated):
    """A decorated thing that cannot be called is a TypeError at once, and not at its call."""
    with pytest.raises(TypeError, match=r"cannot be called.*with"):
        low_precision_layernorm("bf16")(decorated)


@pytest.mark.skipif(FP16 not in AUTOCAST_DTYPES, reason="autocast on CPU has only bfloat16 there")
def test_autocast_of_the_other_dtype_is_stock_and_warns_once(layer_norm):
    """A named dtype leaves an autocast of the other one stock, and says so once."""
    lpln.enable("amp_fp16")
    with pytest.warns(NoEffectWarning, match=r"amp_fp16.*torch.bfloat16"):
        assert output_dtype(layer_norm, dtype=BF16) is FP32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert output_dtype(layer_norm, dtype=BF16) is FP32
    assert output_dtype(layer_norm, dtype=FP16) is FP16


def test_enable_logs_one_line(caplog):
    """Activation leaves one INFO line on the package's logger, and prints nothing."""
    with caplog.at_level(logging.INFO, "lpln_autopatch"):
        lpln.enable("bf16")
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "amp_bf16" in record.getMessage()


def test_exempt_keeps_everything_inside_stock():
    """exempt(module) marks the modules inside now; exempt(module, False) takes the marks off."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Sequential(torch.nn.LayerNorm(8)))
    lpln.enable()
    assert lpln.exempt(model) is model
    assert [output_dtype(m) for m in (model[0], model[1][0])] == [FP32, FP32]
    model.append(torch.nn.LayerNorm(8))
    assert output_dtype(model[2]) is BF16
    assert lpln.exempt(model[1], False) is model[1]
    assert [output_dtype(m) for m in (model[0], model[1][0])] == [FP32, BF16]


def test_exempt_survives_copies_and_is_not_in_the_state_dict(layer_norm):
    """The mark goes along with deepcopy, pickle and torch.save, and leaves state_dict alone."""
    before = set(layer_norm.state_dict())
    lpln.exempt(layer_norm)
    assert set(layer_norm.state_dict()) == before
    buffer = io.BytesIO()
    torch.save(layer_norm, buffer)
    buffer.seek(0)
    trusted = {"weights_only": False} if "weights_only" in torch.load.__code__.co_varnames else {}
    copies = [
        copy.deepcopy(layer_norm),
        copy.copy(layer_norm),
        pickle.loads(pickle.dumps(layer_norm)),
        torch.load(buffer, **trusted),
    ]
    lpln.enable()
    assert {output_dtype(c) for c in copies} == {FP32}
    lpln.exempt(layer_norm, False)
    assert output_dtype(layer_norm) is BF16


def test_exempt_refuses_what_is_no_module():
    """exempt() of a name or a parameter is a TypeError that says what it takes."""
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module or a class of them, not"):
        lpln.exempt("ln_f")
    with pytest.raises(TypeError, match=r"not <class 'torch\.Tensor'>"):
        lpln.exempt(torch.Tensor)


def test_stock_calls_do_not_use_up_the_warning(layer_norm):
    """Modules that would be stock anyway do not warn about the autocast dtype."""
    lpln.enable("amp_fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output_dtype(lpln.exempt(torch.nn.LayerNorm(8)))
        output_dtype(torch.nn.LayerNorm(8).double(), torch.randn(4, 8).double())
    with pytest.warns(NoEffectWarning):
        output_dtype(layer_norm)
