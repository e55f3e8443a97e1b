from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import lpln_autopatch
from lpln_autopatch import forward, state

ORIGINAL_FORWARD = vars(torch.nn.LayerNorm)["forward"]
FUNCTIONS = ("layer_norm", "group_norm", "rms_norm")
ORIGINAL_FUNCTIONS = {name: vars(F)[name] for name in FUNCTIONS if name in vars(F)}


@pytest.fixture(autouse=True)
def _leave_layernorm_as_it_was() -> Iterator[None]:
    """A test that leaves a norm of torch changed fails, and cannot spoil the next one."""
    forward._warned.clear()
    yield
    open_blocks = list(state._blocks.values())
    state._blocks.clear()
    lpln_autopatch.disable()
    left = vars(torch.nn.LayerNorm)["forward"]
    left_functions = {name: vars(F)[name] for name in ORIGINAL_FUNCTIONS}
    torch.nn.LayerNorm.forward = ORIGINAL_FORWARD
    vars(F).update(ORIGINAL_FUNCTIONS)
    if "torch._dynamo" in __import__("sys").modules:
        torch._dynamo.reset()
    assert not open_blocks
    assert left is ORIGINAL_FORWARD
    assert left_functions == ORIGINAL_FUNCTIONS


@pytest.fixture
def layer_norm() -> torch.nn.LayerNorm:
    """A LayerNorm over 8 features whose parameters are not ones and zeros."""
    module = torch.nn.LayerNorm(8)
    torch.nn.init.normal_(module.weight, 1.0, 0.2)
    torch.nn.init.normal_(module.bias, 0.0, 0.2)
    return module
