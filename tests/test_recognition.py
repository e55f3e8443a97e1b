"""Recognition of hand-written norms: the trials, and which forwards are norms."""

from __future__ import annotations

import copy
import random

import hand_written_norms
import pytest
import torch
from hand_written_norms import (
    NEAR_MISSES,
    CountingNorm,
    GatedRMSNorm,
    LlamaRMSNorm,
    LoggingNorm,
    Norm,
    SumNorm,
    autocast,
    by_hand,
    needs_hand_written,
    run,
)

pytestmark = needs_hand_written
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("make", NEAR_MISSES)
def test_near_miss_stays_stock_bit_for_bit(make):
    """A class that is nearly a norm, or does more, gives the output that it gives without us."""
    for training in (True, False):
        module = make().train(training)
        stock = copy.deepcopy(module)
        size = 256 if "Outlier" in make.__name__ else 8
        x = torch.cat([torch.randn(2, 3, size), 1e-4 * torch.randn(2, 3, size)])
        x[0, 0, 0] = 1e4
        inputs = [x, x.bfloat16() if make is not hand_written_norms.SequenceNorm else x]
        torch.manual_seed(0)
        with torch.no_grad():
            expected = [run(stock, x) for x in inputs for _ in range(3)]
        torch.manual_seed(0)
        with by_hand(), torch.no_grad():
            got = [run(module, x) for x in inputs for _ in range(3)]
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype is theirs.dtype
            assert torch.equal(ours, theirs)


def test_forward_that_stores_something_runs_as_often_as_stock():
    """A counter and a log of its own hold what they hold without us."""
    counting, logging = CountingNorm(), LoggingNorm()
    x = torch.randn(2, 8)
    with by_hand():
        for _ in range(3):
            run(counting, x)
            run(logging, x)
    assert counting.calls == 3
    assert logging.log == [x.shape] * 3


def test_second_tensor_is_no_norm_and_a_gate_is_stock():
    """Two tensors are no norm's input; what has an optional one is a norm without it."""
    x, gated = torch.randn(2, 8), GatedRMSNorm()
    with by_hand(), autocast():
        assert SumNorm()(x, x).dtype is FP32
        assert gated(x).dtype is BF16
        assert gated(hidden_states=x).dtype is BF16
        assert gated(x, None).dtype is BF16
        assert gated(x, x).dtype is FP32
        assert gated(x, gate=x).dtype is FP32


def test_modes_of_the_caller_change_nothing():
    """A device block, inference mode, vmap, jvp-free transforms, a default dtype of bfloat16."""
    x = torch.randn(4, 8)

    def fresh():
        class FreshRMSNorm(Norm):  # that nobody has tried
            def forward(self, x):
                x = x.float()
                return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt())

        return FreshRMSNorm()

    with by_hand(), autocast():
        with torch.device("meta"):
            module = LlamaRMSNorm()
        module.to_empty(device="cpu").weight.data.fill_(1)
        with torch.device("meta"):
            assert module(x).dtype is BF16
            assert not module(x).is_meta
        with torch.inference_mode():
            assert fresh()(x).dtype is BF16
        assert torch.vmap(fresh())(x).dtype is BF16
        module = fresh()
        grad = torch.func.grad(lambda weight: _sum(module, weight, x))(module.weight.detach())
        assert grad.shape == (8,)
        torch.set_default_dtype(BF16)
        try:
            assert fresh()(x).dtype is BF16
        finally:
            torch.set_default_dtype(FP32)
        from torch._subclasses.fake_tensor import FakeTensorMode

        module = fresh()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(mode.from_tensor(x)).dtype is BF16
        assert fresh()(x).dtype is BF16


def _sum(module, weight, x):
    return torch.func.functional_call(module, {"weight": weight}, x).float().sum()


def test_trial_leaves_nothing_behind():
    """A trial changes no generator, parameter, gradient, hook or attribute of the module."""
    module, x = LlamaRMSNorm(), torch.randn(4, 8)
    dropping = hand_written_norms.DroppingNorm().eval()
    before = {**vars(module)}, module.weight.detach().clone()
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate()
    with by_hand(), torch.no_grad():
        for each in (module, dropping):
            run(each, x)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert vars(module) == before[0]
    assert torch.equal(module.weight, before[1])
    assert module.weight.grad is None
