from __future__ import annotations

import asyncio
import copy
import io
import logging
import os
import pickle
import random
import textwrap
import threading
import time
import warnings

import importlib_metadata
import pytest
import torch
import wrapt
from support import AUTOCAST_DTYPES, autocast, output_dtype, run_forked

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


def test_enable_again_replaces_precision(layer_norm):
    """The last enable() holds, and one disable() ends it."""
    lpln.enable("bf16")
    with pytest.warns(NoEffectWarning):
        lpln.enable("fp32")
    assert output_dtype(layer_norm) is FP32
    lpln.enable("amp")
    assert output_dtype(layer_norm) is BF16
    lpln.disable()
    assert lpln.status().precision is None


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


def test_innermost_block_wins(layer_norm):
    """Blocks nest, go before the base, and give back what they found."""
    lpln.enable("amp")
    with low_precision_layernorm("fp32"):
        assert output_dtype(layer_norm) is FP32
        with low_precision_layernorm("amp"):
            assert output_dtype(layer_norm) is BF16
        assert output_dtype(layer_norm) is FP32
    assert output_dtype(layer_norm) is BF16


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


def test_status_needs_no_metadata_of_wrapt(monkeypatch):
    """A wrapt that was copied beside a program has none: its version is still there."""
    monkeypatch.setattr(importlib_metadata.Distribution, "discover", lambda **context: iter(()))
    assert lpln.status().versions["wrapt"] == wrapt.__version__


def test_status_shows_a_variable_that_nobody_read(monkeypatch):
    """LPLN_PRECISION that is set while nothing is active is visible in status()."""
    monkeypatch.setenv("LPLN_PRECISION", "amp")
    assert lpln.status().environment == "amp"
    assert lpln.status().precision is None


def test_disable_inside_a_block_keeps_the_block(layer_norm):
    """disable() in a block clears the base; the wrapper goes with the last block."""
    lpln.enable("amp")
    with low_precision_layernorm("bf16"):
        with low_precision_layernorm("amp"):
            lpln.disable()
            with low_precision_layernorm("amp"):
                pass
            assert output_dtype(layer_norm) is BF16
        assert lpln.status().source == "block"
    assert output_dtype(layer_norm) is FP32
    assert not lpln.status().installed


def test_enable_after_disable_inside_a_block_holds(layer_norm):
    """The last word inside a block is enable(): it outlives the block."""
    with low_precision_layernorm("bf16"):
        lpln.disable()
        lpln.enable("amp")
    assert output_dtype(layer_norm) is BF16


@pytest.mark.parametrize("arguments", [("bf61",), ("amp", "cuda"), ("off",), (None,)])
@pytest.mark.parametrize("ask", [lpln.enable, low_precision_layernorm])
def test_refused_request_changes_nothing(layer_norm, ask, arguments):
    """A bad precision or backend is a ValueError at the call, and the state stays."""
    lpln.enable("bf16")
    before = lpln.status()
    with pytest.raises(ValueError, match="Valid: "):
        ask(*arguments)
    assert lpln.status() == before
    assert output_dtype(layer_norm) is BF16


def test_failing_installation_changes_nothing(layer_norm, monkeypatch):
    """A request whose function cannot be found is forgotten, and nothing is exchanged."""
    from lpln_autopatch import _exchange, _state

    where = torch.utils.checkpoint, "no_such_function"
    broken = _exchange.Exchange.of_torch(*where, lambda stock: stock)
    patches = _state._patches()
    monkeypatch.setattr(patches, "_checkpointing", [*patches._checkpointing, broken])
    before = torch.utils.checkpoint.CheckpointFunction.forward.__code__
    for ask in (lpln.enable, low_precision_layernorm().__enter__):
        with pytest.raises(AttributeError, match="no_such_function"):
            ask()
        assert lpln.status().precision is None
        assert not lpln.status().installed
        assert torch.utils.checkpoint.CheckpointFunction.forward.__code__ is before
        assert output_dtype(layer_norm) is FP32


@pytest.mark.parametrize("name", ["fp32", "fp16", "amp_fp8"])
def test_precision_that_never_engages_warns(name):
    """Composer's other precisions are accepted with a NoEffectWarning, here at the caller."""
    with pytest.warns(NoEffectWarning, match=name) as caught:
        lpln.enable(name)
    assert caught[0].filename == __file__
    lpln.disable()
    with pytest.warns(NoEffectWarning, match=name) as caught, low_precision_layernorm(name):
        pass
    assert caught[0].filename == __file__


def test_inner_block_that_switches_off_does_not_warn():
    """fp32 inside an active block or base is a switch, not a mistake."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with low_precision_layernorm("amp"), low_precision_layernorm("fp32"):
            pass
        lpln.enable("amp")
        with low_precision_layernorm("fp32"):
            pass


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


def test_status_says_what_is_in_force():
    """status() gives precision, backend, source, installation and versions, readably."""
    assert lpln.status().precision is None
    lpln.enable("bf16")
    status = lpln.status()
    assert (status.precision, status.backend, status.source) == ("amp_bf16", "native", "enable")
    assert status.installed
    assert status.versions["torch"] == torch.__version__
    assert status.versions["lpln_autopatch"] == lpln.__version__
    assert "amp_bf16" in str(status)
    with low_precision_layernorm("amp"):
        assert lpln.status().precision is lpln.Precision.AMP
        assert lpln.status().source == "block"


def test_enable_logs_one_line(caplog):
    """Activation leaves one INFO line on the package's logger, and prints nothing."""
    with caplog.at_level(logging.INFO, "lpln_autopatch"):
        lpln.enable("bf16")
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "amp_bf16" in record.getMessage()


def test_overlapping_blocks_of_two_threads_do_not_restore_each_other(layer_norm):
    """A thread that leaves first takes away its own block only."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with low_precision_layernorm("fp32"):
            entered.set()
            leave.wait(10)

    with low_precision_layernorm("amp"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        assert output_dtype(layer_norm) is FP32  # the innermost, and process-wide
    assert lpln.status().precision == "fp32"
    leave.set()
    thread.join()
    assert lpln.status().precision is None


def test_threads_at_random_leave_nothing_on(layer_norm):
    """16 threads enter and leave blocks at random, one shared instance among them."""
    shared = low_precision_layernorm("bf16")
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(50):
                block = rng.choice([shared, low_precision_layernorm(rng.choice(["amp", "bf16"]))])
                with block:
                    if rng.random() < 0.3:
                        with shared:
                            assert output_dtype(layer_norm) is BF16
                    assert output_dtype(layer_norm) is BF16
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert lpln.status().precision is None
    assert output_dtype(layer_norm) is FP32


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


def test_block_may_be_left_by_another_thread(layer_norm):
    """Entered in one thread and left in another, as an ExitStack may be: it closes."""
    block = low_precision_layernorm()
    thread = threading.Thread(target=block.__enter__)
    thread.start()
    thread.join()
    assert output_dtype(layer_norm) is BF16
    block.__exit__(None, None, None)
    assert output_dtype(layer_norm) is FP32


@pytest.mark.skipif(FP16 not in AUTOCAST_DTYPES, reason="autocast on CPU has only bfloat16 there")
def test_tasks_that_share_a_block_each_leave_their_own(layer_norm):
    """Two asyncio tasks that enter one instance in turn each leave the block that they entered."""
    shared = low_precision_layernorm("bf16")
    seen = []

    async def first(entered, other_entered):
        with shared:
            entered.set()
            await other_entered.wait()
        # The second's block is the innermost one that is open, above the fp32 one.
        seen.append(output_dtype(layer_norm))

    async def second(first_entered, entered, first_left):
        await first_entered.wait()
        with low_precision_layernorm("fp32"):
            with shared:
                entered.set()
                await first_left
            seen.append(output_dtype(layer_norm))

    async def both():
        first_entered, second_entered = asyncio.Event(), asyncio.Event()
        left = asyncio.ensure_future(first(first_entered, second_entered))
        await asyncio.gather(left, second(first_entered, second_entered, left))

    asyncio.run(both())
    assert seen == [BF16, FP32]
    assert output_dtype(layer_norm) is FP32


def test_stock_calls_do_not_use_up_the_warning(layer_norm):
    """Modules that would be stock anyway do not warn about the autocast dtype."""
    lpln.enable("amp_fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output_dtype(lpln.exempt(torch.nn.LayerNorm(8)))
        output_dtype(torch.nn.LayerNorm(8).double(), torch.randn(4, 8).double())
    with pytest.warns(NoEffectWarning):
        output_dtype(layer_norm)


def test_threads_that_activate_first_share_one_patch():
    """disable() takes off the patch of two threads that activated at once, and first."""
    code = """
        import sys, threading, torch
        import lpln_autopatch as lpln

        original, both = torch.nn.functional.layer_norm, threading.Barrier(2, timeout=60)
        block = lpln.low_precision_layernorm("bf16")
        assert "lpln_autopatch._patch" not in sys.modules

        def work():
            both.wait()
            with block:
                pass

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lpln.disable()
        print(torch.nn.functional.layer_norm is original, lpln.status().installed)
    """
    assert run_forked("-c", textwrap.dedent(code)).stdout.split() == ["True", "False"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork; Linux CI has it")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_forked_while_the_lock_is_held_can_enable(layer_norm):
    """A child does not wait for a lock whose holder does not exist in it."""
    from lpln_autopatch import _state

    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with _state._lock:
            taken.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(10)
    child = os.fork()
    if child == 0:
        lpln.enable()
        os._exit(0 if lpln.status().precision == "amp" else 1)
    for _ in range(200):
        pid, exit_status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
    release.set()
    thread.join()
    assert pid == child
    assert exit_status == 0
