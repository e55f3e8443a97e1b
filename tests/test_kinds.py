"""Kinds of hand-written norms: each is tried once, and what may change is followed."""

from __future__ import annotations

import random
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


def test_trial_that_takes_too_long_rewinds_no_generator(monkeypatch):
    """A trial that was given up leaves the numbers alone that the program has drawn since."""
    monkeypatch.setattr(kinds, "_TRIAL_SECONDS", 0.2)
    go_on, gone_on = threading.Event(), threading.Event()

    class WaitingRMSNorm(Norm):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                go_on.wait(10)
                torch.rand(1)
                gone_on.set()
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    with by_hand():
        assert run(WaitingRMSNorm(), torch.randn(4, 8)).dtype is FP32
    first = torch.rand(3)
    trial = next(thread for thread in threading.enumerate() if thread.name == "lpln_autopatch")
    go_on.set()
    assert gone_on.wait(10)
    trial.join(10)
    assert not torch.equal(torch.rand(3), first)


def test_forward_that_draws_leaves_the_generators_alone():
    """Dropout inside of a norm is refused, and draws no number of the program's."""

    class DroppingRMSNorm(Norm):
        def forward(self, x):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
            return nn.functional.dropout(y, 0.5, self.training) + random.random()

    module, x = DroppingRMSNorm(), torch.randn(4, 8)
    before, pythons = torch.get_rng_state(), random.getstate()
    with by_hand():
        reason = report_of(module.eval(), x).rows[0].reason
    assert "not recognised" in reason
    assert torch.equal(torch.get_rng_state(), before)
    random.setstate(pythons)
    expected = random.random()
    random.setstate(pythons)
    with by_hand():
        module(x)
    assert random.random() != expected  # the call has drawn one number, and no trial another
    random.setstate(pythons)
    random.random()
    second = random.random()
    random.setstate(pythons)
    with by_hand():
        module(x)
    assert random.random() == second


def test_lists_and_tuples_are_told_apart():
    """A forward that asks for the type of a sequence is tried with that type."""

    class ShapeRMSNorm(Norm):
        def __init__(self, shape):
            super().__init__()
            self.shape = shape

        def forward(self, x):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
            return 2 * y if isinstance(self.shape, list) else y

    x = torch.randn(4, 8)
    with by_hand():
        assert run(ShapeRMSNorm((8,)), x).dtype is BF16
        of_list = ShapeRMSNorm([8])
        torch.testing.assert_close(run(of_list, x).float(), of_list(x), rtol=0.01, atol=0.01)
        assert run(ShapeRMSNorm(torch.Size([8])), x).dtype is BF16


def test_forward_that_changes_a_list_is_refused():
    """A norm stores nothing, not in a list of its module either."""

    class CountingRMSNorm(Norm):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            if len(self.seen) < 100:
                self.seen.append(1)
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    with by_hand():
        assert (
            "it changes its module"
            in report_of(CountingRMSNorm(), torch.randn(4, 8)).rows[0].reason
        )


@needs_dynamo
def test_compiled_module_with_a_list_is_lowered():
    """Dynamo takes the description of a list as a constant."""

    class ListRMSNorm(Norm):
        def __init__(self):
            super().__init__()
            self.shape = [8]

        def forward(self, x):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
            return y.reshape(*x.shape[:-1], *self.shape)

    module, x = ListRMSNorm(), torch.randn(4, 8)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with by_hand(), autocast():
        assert module(x).dtype is BF16
        assert compiled(x).dtype is BF16
