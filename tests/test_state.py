"""A change of what is active holds, wherever it is interrupted."""

from __future__ import annotations

import gc
import inspect
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from support import output_dtype

import lpln_autopatch as lpln
from lpln_autopatch import (
    _activation,
    _dynamo,
    _exchange,
    _norms,
    _patch,
    _state,
    low_precision_layernorm,
)

BF16, FP32 = torch.bfloat16, torch.float32
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
    """Wherever in a change it happens, the change holds, and nothing is left of the block."""
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
        taken.append(_state._lock.acquire(timeout=10))
        _state._lock.release()

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
        assert _state.recorder is None, position
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
