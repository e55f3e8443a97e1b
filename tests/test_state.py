"""A change of what is in force holds, wherever it is interrupted."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from support import output_dtype

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm, patch, state

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
        if frame.f_globals is vars(state) or frame.f_globals is vars(patch):
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
