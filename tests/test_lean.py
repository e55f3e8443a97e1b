"""The lean backend: what it keeps for backward, and that the gradients are right without x."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICE, autocast, run_python, runs_kernels
from torch.utils.checkpoint import checkpoint

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch.backends import fused, native
from lpln_autopatch.backends.fused import grid, lean
from lpln_autopatch.backends.fused import recovery as rules

pytestmark = runs_kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def on_the_kernels_device(monkeypatch):
    """Tensors are where the kernels run; in the interpreter tiles are large, for it loops."""

    def tile(n, of_long_rows):
        return grid.Tile(64, 1 << (n - 1).bit_length(), 4, False)

    if DEVICE == "cpu":
        monkeypatch.setattr(grid, "tile", tile)
        monkeypatch.setattr(fused, "_plans", {})
    with torch.device(DEVICE):
        yield


def parameters(n=64, bias_over_weight=None):
    """A weight around 1, and a bias around 0 or so many times as large as the weight."""
    weight = 1 + 0.2 * torch.randn(n)
    bias = 0.2 * torch.randn(n)
    if bias_over_weight is not None:
        bias = bias_over_weight * weight * torch.randn(n).sign()
    return torch.nn.Parameter(weight), torch.nn.Parameter(bias)


def with_weights(weight, n, *values):
    """`weight`, with the given values at `n` features of it, all over it."""
    with torch.no_grad():
        positions = torch.linspace(0, weight.numel() - 1, n).long()
        weight[positions] = torch.tensor([values[i % len(values)] for i in range(n)])
    return weight


def run(x, weight, bias, dy, dtype=BF16, normalise=lean):
    """Output and gradients of all that there are."""
    y = normalise(x, (x.shape[-1],), weight, bias, 1e-5, dtype)
    if normalise is lean:
        assert "FusedNorm" in type(y.grad_fn).__name__
    wanted = [t for t in (x, weight, bias) if t is not None]
    return [y, *torch.autograd.grad(y, wanted, dy)]


def exact(x, weight, bias, dy):
    """The same, in float64."""
    leaves = [t if t is None else t.detach().double() for t in (x, weight, bias)]
    wanted = [t.requires_grad_() for t in leaves if t is not None]
    y = torch.nn.functional.layer_norm(leaves[0], (x.shape[-1],), *leaves[1:])
    return [y, *torch.autograd.grad(y, wanted, dy.double())]


def error(result, expected):
    return ((result.double() - expected).norm() / expected.norm()).item()


def kept_storages(function):
    """What autograd keeps of `function()`: the address and bytes of each storage; its result."""
    storages: dict[int, int] = {}
    alive = []

    def pack(t):
        alive.append(t)
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return storages, y


def keeps_y(x, weight, bias):
    storages, y = kept_storages(lambda: lean(x, x.shape[-1:], weight, bias, 1e-5, BF16))
    return y.untyped_storage().data_ptr() in storages


# --- values, dtypes, gradients


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("bias_over_weight", [None, 1, 4.9, 50])
def test_gradients_are_closer_than_composers(x_dtype, bias_over_weight):
    """dx is below the recipe's 1.8e-3, dweight within 1e-2 even beside a large bias."""
    torch.manual_seed(0)
    weight, bias = parameters(768, bias_over_weight)
    x = (torch.randn(1024, 768) + 1).to(x_dtype).requires_grad_()
    dy = torch.randn(1024, 768).to(BF16)
    y, dx, dweight, dbias = run(x, weight, bias, dy)
    y_exact, dx_exact, dweight_exact, dbias_exact = exact(x, weight, bias, dy)
    assert error(y, y_exact) < 1.8e-3
    assert error(dx, dx_exact) < 1.8e-3
    if x_dtype is FP32:  # else dx itself is rounded
        assert error(dx, dx_exact) < 7e-4
    assert error(dweight, dweight_exact) < (1e-2 if bias_over_weight else 2e-3)
    assert error(dbias, dbias_exact) < 1e-6


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_without_parameters_y_is_xhat(x_dtype):
    """Neither weight nor bias: y and 1 / std are all that is kept."""
    torch.manual_seed(0)
    x = torch.randn(64, 768).to(x_dtype).requires_grad_()
    dy = torch.randn(64, 768).to(BF16)
    y, dx = run(x, None, None, dy)
    assert error(dx, exact(x, None, None, dy)[1]) < 1.8e-3
    storages, y = kept_storages(lambda: lean(x, (768,), None, None, 1e-5, BF16))
    assert sum(storages.values()) == y.nbytes + 64 * 4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_parameters_may_be_missing(weighted, biased):
    """Without weight, without bias, without both; over several dimensions; strided inputs."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(1 + 0.2 * torch.randn(6, 8)) if weighted else None
    bias = torch.nn.Parameter(3 * torch.randn(6, 8)) if biased else None
    x = torch.randn(8, 6, 5).transpose(0, 2).requires_grad_()
    wanted = [t for t in (x, weight, bias) if t is not None]
    dy = torch.randn(8, 6, 5).transpose(0, 2).to(BF16)
    got, expected = (
        torch.autograd.grad(f(x, (6, 8), weight, bias, 1e-5, BF16), wanted, dy)
        for f in (lean, native.normalise)
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients_are_computed(frozen):
    """Any of x, weight and bias may want no gradient, and gets none."""
    torch.manual_seed(0)
    leaves = [torch.randn(4, 64).requires_grad_(), *parameters()]
    leaves[frozen].requires_grad_(False)
    lean(leaves[0], (64,), *leaves[1:], 1e-5, BF16).float().square().sum().backward()
    assert [t.grad is None for t in leaves] == [i == frozen for i in range(3)]


# --- weights from which xhat cannot be recovered


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-8, -1e-8, 1e-30])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("count", [1, 24, 25, 768])
def test_weights_of_nothing_get_their_gradient(value, dtype, count):
    """One feature, as many as are reserved, one more, all: weights of 0 or nearly 0."""
    torch.manual_seed(0)
    weight, bias = parameters(768)
    with_weights(weight, count, value)
    x = torch.randn(256, 768, requires_grad=True)
    dy = torch.randn(256, 768).to(dtype)
    _, dx, dweight, _ = run(x, weight, bias, dy, dtype)
    _, dx_exact, dweight_exact, _ = exact(x, weight, bias, dy)
    of_these = (weight == value).nonzero().flatten()
    assert len(of_these) == count
    # Beside the size of a sum of 256 terms.
    assert (dweight - dweight_exact)[of_these].abs().max() < 16 * 1.2e-2
    assert error(dweight, dweight_exact) < 3e-3
    # Of the smallest weights: dx is of their size.
    assert (dx - dx_exact).norm() <= 1e-3 * dx_exact.norm() + 1e-3 * abs(value)
    few = 24 if DEVICE == "cpu" else 12  # a count that arrives late leaves room for others
    assert keeps_y(x, weight, bias) == (count <= few)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    features=st.sampled_from([1, 2, 31, 33, 64, 200]),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
    zeros=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    bias=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    dtype=st.sampled_from([BF16, FP16]),
)
def test_each_weights_gradient_is_right(seed, features, scale, zeros, bias, dtype):
    """Whatever weights and biases: each feature's own gradient is as far off as xhat may be."""
    torch.manual_seed(seed)
    weight = scale * torch.randn(features) * (torch.rand(features) >= zeros)
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias * torch.randn(features))
    x = torch.randn(128, features, requires_grad=True)
    dy = torch.randn(128, features).to(dtype)
    _, dx, dweight, _ = run(x, weight, bias, dy, dtype)
    _, dx_exact, dweight_exact, _ = exact(x, weight, bias, dy)
    # xhat is off by eps / 2 * (|xhat| + WORST_RATIO) at most; beside it float32's own noise.
    xhat = exact(x, None, None, dy)[0]
    off = torch.finfo(dtype).eps / 2 * (xhat.abs() + rules.WORST_RATIO) + 1e-5
    assert ((dweight - dweight_exact).abs() <= (dy.abs() * off).sum(0)).all()
    along = (weight.abs() * dy.abs()).mean(-1, keepdim=True) * (xhat.abs().amax(-1, True) + 1)
    rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    assert ((dx - dx_exact).abs() <= 4 * rstd * along * off.amax(-1, True) + 1e-30).all()


def test_training_takes_a_weight_through_zero():
    """Weights that pass 0 in training have the right gradient at each step, and at 0 itself."""
    torch.manual_seed(0)
    weight, bias = parameters(64)
    with torch.no_grad():
        weight.copy_(torch.linspace(-0.02, 0.04, 64))
    passed = torch.zeros(64, dtype=torch.bool)
    for step in range(12):
        x = torch.randn(256, 64, requires_grad=True)
        dy = torch.randn(256, 64).to(BF16)
        _, dx, dweight, _ = run(x, weight, bias, dy)
        _, dx_exact, dweight_exact, _ = exact(x, weight, bias, dy)
        assert error(dweight, dweight_exact) < 1.2e-2, step
        assert error(dx, dx_exact) < 1.8e-3, step
        before = weight.detach().clone()
        with torch.no_grad():
            weight.sub_(0.005)
        passed |= before.sign() != weight.sign()
    assert passed.any()


@pytest.mark.parametrize("count", [0, 12, 25])
def test_rows_longer_than_a_block(count, monkeypatch):
    """The kernels that go over a row in blocks recover xhat, too."""
    monkeypatch.setattr(grid, "tile", lambda n, of_long_rows: grid.Tile(16, 128, 4, True))
    torch.manual_seed(0)
    weight, bias = parameters(768)
    with_weights(weight, count, 0.0)
    x = torch.randn(30, 768, requires_grad=True)
    dy = torch.randn(30, 768).to(BF16)
    _, *gradients = run(x, weight, bias, dy)
    assert keeps_y(x, weight, bias) == (count < 24)
    for got, expected in zip(gradients, exact(x, weight, bias, dy)[1:], strict=True):
        assert error(got, expected) < 3e-3


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("count", [0, 24, 25])
def test_rms_norm(count, mean):
    """An RMSNorm is recovered from y as well, which is xhat but for the weight."""
    torch.manual_seed(0)
    weight = with_weights(parameters(768)[0], count, 0.0)
    x = (torch.randn(256, 768) + mean).requires_grad_()
    dy = torch.randn(256, 768).to(BF16)
    storages, y = kept_storages(lambda: lean.rms_norm(x, (768,), weight, 1e-6, BF16))
    few = 24 if DEVICE == "cpu" else 12  # a count that arrives late leaves room for others
    assert (y.untyped_storage().data_ptr() in storages) == (count <= few)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.nn.functional.rms_norm(doubles[0], (768,), doubles[1], 1e-6)
    assert error(y, expected) < 1.8e-3
    got = torch.autograd.grad(y, [x, weight], dy)
    for g, e in zip(got, torch.autograd.grad(expected, doubles, dy.double()), strict=True):
        assert error(g, e) < 3e-3


# --- rows whose variance is below eps


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("ratio", [1, 4.9])
@pytest.mark.parametrize("std", [1.0, 7e-3, 6e-3, 1e-4, 0.0])
def test_rows_of_small_variance_keep_xhat(std, ratio, looped, monkeypatch):
    """Beside an xhat that is small itself the rounding of y is large: dweight is within 1e-2."""
    if looped:
        monkeypatch.setattr(grid, "tile", lambda n, of_long_rows: grid.Tile(16, 128, 4, True))
    torch.manual_seed(0)
    weight, bias = parameters(256, ratio)
    x = (torch.randn(64, 256) * std + 1).requires_grad_()
    dy = torch.randn(64, 256).to(BF16)
    _, dx, dweight, _ = run(x, weight, bias, dy)
    _, dx_exact, dweight_exact, _ = exact(x, weight, bias, dy)
    assert error(dx, dx_exact) < 1.8e-3
    if std == 0:
        assert dweight.norm() == 0
    elif std >= 1e-4:  # beside the mean of 1 float32 holds no more of x
        assert error(dweight, dweight_exact) < 1e-2
    assert keeps_y(x, weight, bias) == (std > 6.4e-3)  # the root of 4 * eps


@pytest.mark.parametrize(("small", "of", "few"), [(2, 64, True), (3, 64, False), (32, 64, False)])
def test_a_few_small_rows_among_others(small, of, few):
    """One row of 32 may be small; where more are, xhat is kept. dweight is within 1e-2 in both."""
    torch.manual_seed(0)
    weight, bias = parameters(256, 4.9)
    x = torch.randn(of, 256)
    x[torch.randperm(of)[:small]] *= 1e-5
    x.requires_grad_()
    dy = torch.randn(of, 256).to(BF16)
    _, _, dweight, _ = run(x, weight, bias, dy)
    assert error(dweight, exact(x, weight, bias, dy)[2]) < 1e-2
    assert keeps_y(x, weight, bias) == (few and DEVICE == "cpu")


def test_small_rows_without_bias_keep_y():
    """Without a bias y is xhat but for its scale, and rounding is relative to it."""
    torch.manual_seed(0)
    weight, _ = parameters(256)
    x = (torch.randn(64, 256) * 1e-5).requires_grad_()
    dy = torch.randn(64, 256).to(BF16)
    _, _, dweight = run(x, weight, None, dy)
    assert error(dweight, exact(x, weight, None, dy)[2]) < 3e-3
    assert keeps_y(x, weight, None)


# --- what is kept


def test_the_output_is_what_is_kept():
    """No x: y itself, 1 / std, the parameters, and 1/32 of xhat."""
    weight, bias = parameters(768)
    for x_dtype in (FP32, BF16):
        x = torch.randn(512, 768).to(x_dtype).requires_grad_()
        storages, y = kept_storages(lambda x=x: lean(x, (768,), weight, bias, 1e-5, BF16))
        assert y.untyped_storage().data_ptr() in storages
        assert x.untyped_storage().data_ptr() not in storages
        # 1 / std, some columns, weight, bias, and the slot of each feature.
        beside = 512 * 4 + 24 * 512 * 2 + 3 * 768 * 4
        assert sum(storages.values()) == y.nbytes + beside


def test_the_next_linears_input_is_the_same_storage():
    """A LayerNorm and the Linear behind it keep one activation between them."""
    torch.manual_seed(0)
    norm, linear = torch.nn.LayerNorm(768), torch.nn.Linear(768, 768)
    x = torch.randn(512, 768, requires_grad=True)

    def kept(backend):
        with low_precision_layernorm("bf16", backend=backend), autocast():
            storages, _ = kept_storages(lambda: linear(norm(x)))
        return sum(storages.values())

    assert kept("native") - kept("lean") > 0.9 * x.nbytes


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("why", ["a replica's", "capturing"])
def test_where_counts_help_nobody_it_is_fused(why, x_dtype, monkeypatch):
    """A weight that is no Parameter, a CUDA graph's capture: no y is kept, and it is right."""
    torch.manual_seed(0)
    weight, bias = parameters()
    if why == "a replica's":
        weight = weight * 1
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

        class OnCuda(torch.nn.Parameter):
            is_cuda = True

        assert not rules.can_count(OnCuda(weight))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert rules.can_count(OnCuda(weight))
        monkeypatch.setattr(rules, "can_count", lambda weight: False)
    x = torch.randn(256, 64).to(x_dtype).requires_grad_()
    assert not keeps_y(x, weight, bias)
    dy = torch.randn(256, 64).to(BF16)
    _, dx, dweight, _ = run(x, weight, bias, dy)
    assert error(dx, exact(x, weight, bias, dy)[1]) < (1e-3 if x_dtype is FP32 else 1.8e-3)
    assert error(dweight, exact(x, weight, bias, dy)[2]) < 2e-3


@pytest.fixture
def counts_arrive_late(monkeypatch):
    """As on CUDA: nothing waits for a count but the first of a parameter; who waited is listed."""
    from lpln_autopatch.backends.fused.plan import Plan

    waited = []
    wait = rules.Tally.wait

    def waits(tally, slots, rows):
        waited.append(tally.counts[0].item())
        return wait(tally, slots, rows)

    monkeypatch.setattr(Plan, "counts_arrive_late", True)
    monkeypatch.setattr(rules.Tally, "wait", waits)
    monkeypatch.setattr(rules, "tallies", {})
    return waited


def test_on_an_accelerator_only_the_first_count_is_waited_for(counts_arrive_late):
    """The first call waits. A later one knows the weights of the one before: the reserve helps."""
    torch.manual_seed(0)
    weight, bias = parameters(768)
    x = torch.randn(256, 768, requires_grad=True)
    dy = torch.randn(256, 768).to(BF16)
    assert keeps_y(x, weight, bias)
    with_weights(weight, 24, 0.0)  # as many as are reserved, in one step
    assert keeps_y(x, weight, bias)  # and its count is on its way
    for _ in range(2):
        _, _, dweight, _ = run(x, weight, bias, dy)
        assert error(dweight, exact(x, weight, bias, dy)[2]) < 2e-3
        assert not keeps_y(x, weight, bias)
    with torch.no_grad():
        weight.fill_(1)
    assert [keeps_y(x, weight, bias) for _ in range(2)] == [False, True]
    assert counts_arrive_late == [0]
    with torch.no_grad():
        (other := parameters(768)[0]).zero_()
    assert not keeps_y(x, other, bias)
    assert counts_arrive_late == [0, 768]


def test_small_rows_are_counted_late_too(counts_arrive_late):
    """A later call knows the rows of the one before."""
    torch.manual_seed(0)
    weight, bias = parameters(256, 4.9)
    dy = torch.randn(64, 256).to(BF16)
    large, small = ((torch.randn(64, 256) * std).requires_grad_() for std in (1, 1e-4))
    assert [keeps_y(x, weight, bias) for x in (large, small, small)] == [True, True, False]
    _, _, dweight, _ = run(small, weight, bias, dy)
    assert error(dweight, exact(small, weight, bias, dy)[2]) < 1e-2
    assert [keeps_y(large, weight, bias) for _ in range(2)] == [False, True]


def test_more_than_the_reserve_in_one_step_is_taken_for_zero_once(counts_arrive_late):
    """The one limit on an accelerator: weights set to 0 by hand, all at once, for one step."""
    torch.manual_seed(0)
    weight, bias = parameters(768)
    x = torch.randn(256, 768, requires_grad=True)
    dy = torch.randn(256, 768).to(BF16)
    run(x, weight, bias, dy)
    with torch.no_grad():
        weight.zero_()
    _, dx, dweight, dbias = run(x, weight, bias, dy)
    _, dx_exact, dweight_exact, dbias_exact = exact(x, weight, bias, dy)
    assert (dweight != 0).sum() == 24
    right = dweight != 0
    assert error(dweight[right], dweight_exact[right]) < 3e-3
    assert (dx == dx_exact).all()
    assert error(dbias, dbias_exact) < 1e-6
    _, _, dweight, _ = run(x, weight, bias, dy)
    assert error(dweight, dweight_exact) < 3e-3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_count_that_arrives_before_recomputation_does_no_harm(counts_arrive_late, use_reentrant):
    """Forward kept y, its recomputation keeps xhat: the gradients are right."""
    torch.manual_seed(0)
    weight, bias = parameters(768)
    x = torch.randn(256, 768, requires_grad=True)
    dy = torch.randn(256, 768).to(BF16)
    run(x, weight, bias, dy)
    with_weights(weight, 20, 0.0)
    arrived = rules.tally_of(weight).arrived

    def block(x):
        return lean(x, (768,), weight, bias, 1e-5, BF16)

    y = checkpoint(block, x, use_reentrant=use_reentrant)
    if not use_reentrant:  # that has run its forward without gradients
        assert arrived[0].item() == 20
    y.backward(dy)
    _, dx_exact, dweight_exact, _ = exact(x, weight, bias, dy)
    assert error(x.grad, dx_exact) < 1e-3
    assert error(weight.grad, dweight_exact) < 2e-3


def test_counts_are_forgotten_with_the_parameter(counts_arrive_late):
    """No parameter is kept alive, and a new one of its address is counted anew."""
    weight, bias = parameters()
    run(torch.randn(4, 64, requires_grad=True), weight, bias, torch.randn(4, 64).to(BF16))
    assert len(rules.tallies) == 1
    del weight
    assert len(rules.tallies) == 0


def test_counts_stay_on_the_device_of_the_parameter(counts_arrive_late):
    """`model.to` keeps the parameters: on another device they are counted anew."""
    weight, bias = parameters()
    x, dy = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64).to(BF16)
    run(x, weight, bias, dy)
    tally = rules.tally_of(weight)
    assert tally is not None
    tally.counts = tally.counts.to("meta")
    assert rules.tally_of(weight) is None
    run(x, weight, bias, dy)
    assert rules.tally_of(weight) is not None
    assert len(counts_arrive_late) == 2


# --- whatever else autograd is asked for


def test_output_modified_in_place_is_an_error():
    """y is kept: backward refuses it once it has been changed, as PyTorch's own nodes do."""
    weight, bias = parameters()
    x = torch.randn(4, 64, requires_grad=True)
    for change in (lambda y: y.add_(1), lambda y: y.detach().zero_()):
        y = lean(x, (64,), weight, bias, 1e-5, BF16)
        change(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_input_modified_in_place_is_none():
    """x is not kept: what happens to it after the call is nobody's business."""
    weight, bias = parameters()
    x = torch.randn(4, 64, requires_grad=True)
    dy = torch.randn(4, 64).to(BF16)
    copied = x * 1
    y = lean(copied, (64,), weight, bias, 1e-5, BF16)
    copied.zero_()
    assert torch.equal(torch.autograd.grad(y, [x], dy)[0], run(x, weight, bias, dy)[1])


def test_batched_gradients():
    """is_grads_batched: vmap runs through backward."""
    torch.manual_seed(0)
    weight, bias = parameters()
    x = torch.randn(4, 64, requires_grad=True)
    y = lean(x, (64,), weight, bias, 1e-5, BF16)
    dy = torch.randn(3, 4, 64).to(BF16)
    leaves = [x, weight, bias]
    got = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(y, leaves, dy[i], retain_graph=True)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g[i], e)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_gives_the_same_gradients(use_reentrant):
    """Both kinds of checkpointing, around a norm and a Linear."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    x = torch.randn(8, 64, requires_grad=True)
    wanted = [x, *block.parameters()]

    def gradients(run):
        for t in wanted:
            t.grad = None
        with autocast():
            y = run()
        y.float().square().sum().backward()
        return [t.grad for t in wanted]

    with low_precision_layernorm("bf16", backend="lean"):
        expected = gradients(lambda: block(x))
        got = gradients(lambda: checkpoint(block, x, use_reentrant=use_reentrant))
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def test_hooks_on_saved_tensors():
    """save_on_cpu and its like may give back what they like of the same values."""
    torch.manual_seed(0)
    weight, bias = parameters()
    x = torch.randn(8, 64, requires_grad=True)
    dy = torch.randn(8, 64).to(BF16)
    expected = run(x, weight, bias, dy)
    moved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: moved.append(t.numel()) or t.t().clone(), lambda t: t.t()
    ):
        y = lean(x, (64,), weight, bias, 1e-5, BF16)
    got = torch.autograd.grad(y, [x, weight, bias], dy)
    for g, e in zip(got, expected[1:], strict=True):
        torch.testing.assert_close(g, e)
    assert sum(moved) < 2 * x.numel()  # what stands for x in second derivatives is not among them


def test_threads_share_a_model():
    """As DataParallel does: several threads, one forward and one backward each."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(64)
    x = torch.randn(4, 8, 64)
    results: dict[int, torch.Tensor] = {}

    def work(i):
        with autocast():
            y = norm(x[i])
        (results[i],) = torch.autograd.grad(y.float().square().sum(), [norm.weight])

    with low_precision_layernorm("bf16", backend="lean"):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = [results[i] for i in range(4)]
        for i in range(4):
            work(i)
            assert torch.equal(results[i], together[i])


# --- by name, by surgery, compiled


def test_named_by_every_way(layer_norm):
    """enable, a block, the variable, surgery and the doctor know it."""
    from lpln_autopatch import _doctor, backends

    lpln.enable(backend="lean")
    assert lpln.status().backend == "lean"
    with autocast():
        y = layer_norm(torch.randn(4, 8))
    assert "FusedNorm" in type(y.grad_fn).__name__
    assert "lean" in backends.names()
    assert _doctor.diagnose()["backends"]["lean"]["usable"]
    code = "import torch, lpln_autopatch; print(lpln_autopatch.status().backend)"
    variables = {"LPLN_PRECISION": "amp", "LPLN_BACKEND": "lean"}
    assert run_python("-c", code, **variables).stdout == "lean\n"


def test_surgery_is_copied_and_pickled():
    """A model under surgery with lean: deepcopy and pickle run lean again."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(64))
    lpln.apply_low_precision_layernorm(model, backend="lean")
    x = torch.randn(4, 64, requires_grad=True)
    with autocast():
        y = model(x)
        y.sum().backward()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), y)
            assert "FusedNorm" in type(other(x).grad_fn).__name__
    assert vars(model[0].weight) == {}


# --- compiled


def test_compiled_code_is_natives():
    """In a graph an in-place operation on the output is right, as it is native's there."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(64, elementwise_affine=False)
    x = torch.randn(32, 64, requires_grad=True)
    scale = torch.randn(64)

    def gradient(backend):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: norm(x).mul_(scale).relu_(), backend="aot_eager")
        with low_precision_layernorm("bf16", backend=backend), autocast():
            return torch.autograd.grad(compiled(x).float().pow(2).sum(), x)[0]

    assert torch.equal(gradient("lean"), gradient("native"))


def test_compiled_second_derivatives_are_natives():
    """What Dynamo traces for a backend that differentiates twice is native's."""
    x = torch.randn(4, 32, requires_grad=True)

    def second(backend):
        torch._dynamo.reset()
        f = torch.compile(lambda x: lpln_norm(x).pow(3).sum(), backend="eager")
        with low_precision_layernorm("bf16", backend=backend), autocast():
            (first,) = torch.autograd.grad(f(x), x, create_graph=True)
        return torch.autograd.grad(first.float().pow(2).sum(), x)[0]

    def lpln_norm(x):
        return torch.nn.functional.layer_norm(x, (32,))

    assert torch.equal(second("lean"), second("native"))


@pytest.mark.parametrize("backend", ["fused", "lean"])
@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("wants_x", [False, True])
def test_compiled_autograd(backend, x_dtype, wants_x):
    """Compiled autograd traces backward in operators: the gradients of an eager one."""
    torch.manual_seed(0)
    norm, linear = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)
    x = torch.randn(8, 64).to(x_dtype)
    wanted = [*([x.requires_grad_()] if wants_x else []), *norm.parameters()]

    def gradients(context):
        for t in wanted:
            t.grad = None
        with low_precision_layernorm("bf16", backend=backend), autocast():
            y = linear(norm(x))
        assert "FusedNorm" in str(y.grad_fn.next_functions)
        with context:
            y.float().pow(2).mean().backward()
        return [t.grad.float() for t in wanted]

    from torch._dynamo import compiled_autograd

    expected = gradients(contextlib.nullcontext())
    torch._dynamo.reset()
    got = gradients(compiled_autograd._enable(torch.compile(backend="eager")))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-2, atol=1e-4)
