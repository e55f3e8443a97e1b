"""Kinds of hand-written norms: each is tried once, and what may change is followed."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hand_written_norms import (
    LlamaRMSNorm,
    Norm,
    autocast,
    by_hand,
    needs_hand_written,
    report_of,
    run,
)
from support import needs_dynamo
from torch import nn

from lpln_autopatch._hand_written import kinds, recognition

pytestmark = needs_hand_written
BF16, FP32 = torch.bfloat16, torch.float32


def test_what_changes_later_is_followed_or_stock():
    """eps and weights are read at each call; a new option of the class decides anew."""

    class OptionRMSNorm(Norm):
        def __init__(self):
            super().__init__()
            self.cap = None

        def forward(self, x):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
            return y if self.cap is None else y.clamp(-self.cap, self.cap)

    module, x = OptionRMSNorm(), torch.randn(4, 8)
    with by_hand():
        assert run(module, x).dtype is BF16
        module.eps = 10.0
        torch.testing.assert_close(run(module, x).float(), module(x), rtol=0.01, atol=0.01)
        assert run(module, x).dtype is BF16
        module.weight = nn.Parameter(torch.full((8,), 7.0))
        torch.testing.assert_close(run(module, x).float(), module(x), rtol=0.01, atol=0.01)
        module.cap = 0.5
        assert torch.equal(run(module, x), module(x))
        module.cap = None
        assert run(module, x).dtype is BF16


def test_parameters_are_read_through_attributes():
    """functional_call, a parametrization, and a weight that is a plain tensor, as in FSDP 1."""
    x = torch.randn(4, 8)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    plain, parametrized, module = LlamaRMSNorm(), LlamaRMSNorm(), LlamaRMSNorm()
    expected = 2 * parametrized(x)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", Double())
    weight = plain.weight.detach().clone()
    del plain.weight
    plain.weight = 3 * weight
    with by_hand(), autocast():
        y = torch.func.functional_call(module, {"weight": torch.zeros(8)}, x)
        assert y.dtype is BF16
        assert not y.any()
        torch.testing.assert_close(parametrized(x).float(), expected, rtol=0.01, atol=0.01)
        assert parametrized(x).dtype is BF16
        assert plain(x).dtype is BF16
        torch.testing.assert_close(
            plain(x).float(), plain(x.double()).float(), rtol=0.01, atol=0.01
        )


def test_trial_takes_little_and_is_made_once():
    """Less than 150 ms of a core, and once for all layers of a kind."""
    tried = []
    recognise = recognition.recognise

    def timed(*args):
        start = time.thread_time()
        result = recognise(*args)
        tried.append(time.thread_time() - start)
        return result

    class WideRMSNorm(Norm):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    x = torch.randn(2, 3, 4096)
    with pytest.MonkeyPatch.context() as patch, by_hand():
        patch.setattr(kinds, "recognise", timed)
        for _ in range(3):
            assert run(WideRMSNorm(4096), x).dtype is BF16
            assert run(WideRMSNorm(4096), x[0]).dtype is BF16
    assert len(tried) == 1
    assert tried[0] < 0.15


def test_number_that_changes_all_the_time_ends_the_trials(monkeypatch):
    """A forward with too many kinds is stock from then on; what is known stays known."""
    monkeypatch.setattr(kinds, "_MOST_KINDS", 3)

    class AnnealedRMSNorm(Norm):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    module, x = AnnealedRMSNorm(), torch.randn(4, 8)
    with by_hand():
        dtypes = []
        for eps in (1e-3, 1e-4, 1e-5, 1e-6, 1e-3):
            module.eps = eps
            dtypes.append(run(module, x).dtype)
    assert dtypes == [BF16, BF16, BF16, FP32, BF16]


def test_verdict_of_a_trial_that_failed_is_not_kept():
    """A trial that raised for a reason of the moment runs again at the next call."""
    moment = [MemoryError("of the moment")]

    class MomentaryRMSNorm(Norm):
        def forward(self, x):
            if moment and threading.current_thread() is not threading.main_thread():
                raise moment[0]
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    module, x = MomentaryRMSNorm(), torch.randn(4, 8)
    with by_hand():
        assert run(module, x).dtype is FP32
        assert "MemoryError: of the moment" in report_of(module, x).rows[0].reason
        moment.clear()
        assert [run(module, x).dtype for _ in range(8)][-1] is BF16


@needs_dynamo
def test_layers_of_a_kind_share_a_graph():
    """Compiled one by one, as many layers as there are need two graphs."""
    with by_hand():
        pass
    graphs = []
    layers = [LlamaRMSNorm() for _ in range(4)]

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for layer in layers:
        layer.compile(backend=count, fullgraph=True)
    x = torch.randn(4, 8)
    for layer in layers:
        assert run(layer, x).dtype is FP32
        with by_hand():
            assert run(layer, x).dtype is BF16
    assert len(graphs) == 2
