"""Blocks of a trainer's callback, without a trainer."""

from __future__ import annotations

import gc

import torch
from support import output_dtype

import lpln_autopatch as lpln
from lpln_autopatch.integrations.blocks import Blocks


class Training:
    """An object that a trainer passes to its callbacks."""


def test_training_that_never_ends_is_forgotten_when_it_is_gone(layer_norm):
    """A training that is freed leaves its block; one that ends is forgotten at once."""
    blocks = Blocks("bf16", "native", None)
    ended, gone = Training(), Training()
    for training in (ended, gone, gone):
        blocks.enter(training)
    assert output_dtype(layer_norm) is torch.bfloat16
    assert len(blocks._leave) == 2
    blocks.leave(ended)
    blocks.leave(ended)
    assert output_dtype(layer_norm) is torch.bfloat16
    assert len(blocks._leave) == 1
    del training, gone
    gc.collect()
    assert len(blocks._leave) == 0
    assert output_dtype(layer_norm) is torch.float32
    assert lpln.status().precision is None
