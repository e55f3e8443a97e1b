"""The block that callbacks open for a training."""

from __future__ import annotations

import copy

import pytest
import torch
from support import output_dtype

from lpln_autopatch import status
from lpln_autopatch.integrations.blocks import Blocks


class Training:
    """Stands for a Trainer, or for the state of one."""


def test_every_training_has_the_norms_that_were_named():
    """An iterator of names holds for the second training too, and in a copy."""
    blocks = Blocks("bf16", "native", iter(["group_norm"]))
    for each in (blocks, blocks, copy.deepcopy(blocks)):
        training = Training()
        each.enter(training)
        assert status().norms == ("group_norm",)
        assert output_dtype(torch.nn.GroupNorm(2, 8)) is torch.bfloat16
        assert output_dtype(torch.nn.LayerNorm(8)) is torch.float32
        each.leave(training)
        assert output_dtype(torch.nn.GroupNorm(2, 8)) is torch.float32


def test_wrong_norm_is_refused_at_once():
    """Not when a training begins."""
    with pytest.raises(ValueError, match="norms='layernorm': 'layernorm' is not a norm"):
        Blocks("bf16", "native", "layernorm")
