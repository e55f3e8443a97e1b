"""State: the innermost block or the base is active; an interrupted change holds."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import sys
import textwrap
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from support import AUTOCAST_DTYPES, output_dtype, run_forked

import lpln_autopatch as lpln
from lpln_autopatch import (
    NoEffectWarning,
    _activation,
    _dynamo,
    _exchange,
    _lock,
    _norms,
    _patch,
    _state,
    low_precision_layernorm,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LayerNorm = torch.nn.LayerNorm


def block_in_a_cycle() -> None:
    """Leave a block to the garbage collector: a generator that holds it, in a cycle."""

    def generator():
        with low_precision_layernorm("fp32"), low_precision_layernorm("bf16"):
            yield

    held = [generator()]
    next(held[0])
    held.append(held)


@pytest.mark.filterwarnings("ignore::lpln_autopatch.NoEffectWarning")
@pytest.mark.parametrize("what", ["enable", "disable", "block"])
def test_block_that_the_garbage_collector_closes_in_a_change(layer_norm, what):
    """A block closed anywhere in a change leaves the change valid, and nothing of itself."""
    original = vars(LayerNorm)["forward"]

    def change() -> None:
        block.__enter__() if what == "block" else getattr(lpln, what)()

    def collect_at(frame, event, argument) -> None:
        if any(frame.f_globals is vars(module) for module in (_state, _patch, _exchange)):
            calls.append(event)
        if len(calls) == position:
            sys.setprofile(None)
            gc.collect()

    position, calls = 0, []
    gc.collect()
    gc.freeze()  # what is there already need not be looked at every time
    gc.disable()
    try:
        while len(calls) >= position:
            position, calls = position + 1, []
            block = low_precision_layernorm("amp")
            if what == "disable":
                lpln.enable()
            block_in_a_cycle()
            sys.setprofile(collect_at)
            change()
            sys.setprofile(None)
            gc.collect()
            expected = (None, FP32) if what == "disable" else ("amp", BF16)
            assert (lpln.status().precision, output_dtype(layer_norm)) == expected, position
            if what == "block":
                block.__exit__(None, None, None)
            lpln.disable()
            assert vars(LayerNorm)["forward"] is original, position
    finally:
        sys.setprofile(None)
        gc.enable()
        gc.unfreeze()
    assert position > 10


def interrupted_at(position: int, function) -> bool:
    """Run `function` with a KeyboardInterrupt at that place in our code, if there are so many.

    Python looks for signals where a function begins, and behind a call of one written in C. Where
    `__exit__` begins nothing of it has run: no context manager written in Python can help that.
    """
    ours = [vars(module) for module in (_activation, _dynamo, _exchange, _norms, _patch, _state)]
    places = 0

    def profile(frame, event, argument):
        nonlocal places
        begins = event == "call" and frame.f_code.co_name != "__exit__"
        if sys.version_info < (3, 11) and frame.f_lasti >= 0:
            # Python 3.10 skips the `finally` of a generator that goes on, if a profiler raises
            # there. It does not if a signal comes.
            begins = False
        if (begins or event == "c_return") and any(frame.f_globals is names for names in ours):
            places += 1
            if places == position:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return places >= position


def lock_is_free() -> bool:
    taken: list[bool] = []

    def take() -> None:
        taken.append(_lock.lock.acquire(timeout=10))
        _lock.lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken[0]


def a_block() -> None:
    with low_precision_layernorm("bf16"):
        assert _state.current().source == "block"


def an_enabled_block() -> None:
    with lpln.enable("bf16"):
        assert _state.current().source == "enable"


def a_report() -> None:
    assert lpln.report(LayerNorm(8), torch.randn(2, 8)).calls == 1


def what_a_forward_may_see() -> dict[str, object]:
    """Everything that an activation changes in PyTorch."""
    return {
        "function": F.layer_norm.__code__,
        "method": vars(LayerNorm)["forward"],
        "code": inspect.unwrap(LayerNorm.forward).__code__,
        "checkpointing": torch.utils.checkpoint.CheckpointFunction.forward.__code__,
    }


@pytest.mark.parametrize(
    "what",
    [a_block, an_enabled_block, a_report, lpln.enable, lpln.disable],
    ids=lambda function: function.__name__,
)
def test_interrupt_anywhere_leaves_nothing_half_done(layer_norm, what):
    """Ctrl-C wherever Python looks for it: no block open, no lock held, nothing half exchanged."""
    stock = what_a_forward_may_see()
    position = 0
    interrupted = True
    while interrupted:
        position += 1
        if what is lpln.disable:
            lpln.enable()
        interrupted = interrupted_at(position, what)
        assert not _state._scopes, position
        assert _state.recorders is None, position
        active = lpln.status().precision is not None
        assert lpln.status().installed is active, position
        assert output_dtype(layer_norm) is (BF16 if active else FP32), position
        changed = [key for key, value in what_a_forward_may_see().items() if value != stock[key]]
        assert set(changed) - {"checkpointing"} == (
            {"function", "method", "code"} if active else set()
        ), position
        assert lock_is_free(), position
        lpln.disable()
        assert what_a_forward_may_see() == stock, position
    assert position > 50


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


def test_innermost_block_wins(layer_norm):
    """Blocks nest, go before the base, and give back what they found."""
    lpln.enable("amp")
    with low_precision_layernorm("fp32"):
        assert output_dtype(layer_norm) is FP32
        with low_precision_layernorm("amp"):
            assert output_dtype(layer_norm) is BF16
        assert output_dtype(layer_norm) is FP32
    assert output_dtype(layer_norm) is BF16


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
@pytest.mark.parametrize("norms", ["layer_norm", "all"])
def test_child_forked_while_the_lock_is_held_can_enable(layer_norm, norms):
    """A child does not wait for a lock whose holder does not exist in it."""
    lpln.enable("bf16", norms=norms)
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with _lock.lock:
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
