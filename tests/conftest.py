from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lpln_autopatch
from lpln_autopatch import forward, state

ORIGINAL_FORWARD = vars(torch.nn.LayerNorm)["forward"]


@pytest.fixture(autouse=True)
def _leave_layernorm_as_it_was() -> Iterator[None]:
    """A test that leaves LayerNorm.forward changed fails, and cannot spoil the next one."""
    forward._warned.clear()
    yield
    open_blocks = list(state._blocks.values())
    state._blocks.clear()
    lpln_autopatch.disable()
    left = vars(torch.nn.LayerNorm)["forward"]
    torch.nn.LayerNorm.forward = ORIGINAL_FORWARD
    if "torch._dynamo" in __import__("sys").modules:
        torch._dynamo.reset()
    assert not open_blocks
    assert left is ORIGINAL_FORWARD


@pytest.fixture
def layer_norm() -> torch.nn.LayerNorm:
    """A LayerNorm over 8 features whose parameters are not ones and zeros."""
    module = torch.nn.LayerNorm(8)
    torch.nn.init.normal_(module.weight, 1.0, 0.2)
    torch.nn.init.normal_(module.bias, 0.0, 0.2)
    return module
