from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

# A worker of pytest-xdist for each core: more threads in one would wait for those of the others.
# OpenMP reads this when torch is imported, and the processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

from lpln_autopatch import _forward, _state

# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ORIGINAL_FORWARD = vars(torch.nn.LayerNorm)["forward"]
ELSEWHERE = pytest.StashKey[dict[str, int]]()
FUNCTIONS = ("layer_norm", "group_norm", "rms_norm")
ORIGINAL_FUNCTIONS = {name: vars(F)[name] for name in FUNCTIONS if name in vars(F)}


@pytest.fixture(autouse=True)
def _leave_layernorm_as_it_was() -> Iterator[None]:
    """A test that leaves a norm of torch changed fails, and cannot spoil the next one."""
    _forward._warned.clear()
    yield
    open_scopes = _state.reset()
    left = vars(torch.nn.LayerNorm)["forward"]
    left_functions = {name: vars(F)[name] for name in ORIGINAL_FUNCTIONS}
    torch.nn.LayerNorm.forward = ORIGINAL_FORWARD
    vars(F).update(ORIGINAL_FUNCTIONS)
    if "torch._dynamo" in __import__("sys").modules:
        torch._dynamo.reset()
    assert open_scopes == 0
    assert left is ORIGINAL_FORWARD
    assert left_functions == ORIGINAL_FUNCTIONS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is run elsewhere: see `support.run_elsewhere`."""
    marks = ((item, *mark.args) for item in items for mark in item.iter_markers("elsewhere"))
    places = {item: where for item, is_elsewhere, where in marks if is_elsewhere}
    config.hook.pytest_deselected(items=list(places))
    items[:] = [item for item in items if item not in places]
    _told(config).update(Counter(places.values()))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker of pytest-xdist has left out; every one collects the same."""
    _told(node.config).update(node.workeroutput.get("elsewhere", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if told := _told(config):
        places = ", ".join(f"{count} by {where}" for where, count in sorted(told.items()))
        terminalreporter.write_line(f"run elsewhere: {places}")


def _told(config: Any) -> dict[str, int]:
    """Return the counts of tests that run elsewhere, by place. A worker sends its own."""
    if hasattr(config, "workeroutput"):
        return config.workeroutput.setdefault("elsewhere", {})
    return config.stash.setdefault(ELSEWHERE, {})


@pytest.fixture
def layer_norm() -> torch.nn.LayerNorm:
    """A LayerNorm over 8 features whose parameters are not ones and zeros."""
    module = torch.nn.LayerNorm(8)
    torch.nn.init.normal_(module.weight, 1.0, 0.2)
    torch.nn.init.normal_(module.bias, 0.0, 0.2)
    return module
