"""The lean backend: what it keeps for backward, and that the gradients are right without x."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICE, UnderAutocast, autocast, needs_dynamo, run_python, runs_kernels
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch.backends import lean, native
from lpln_autopatch.backends.lean import recovery
from lpln_autopatch.torch_compat import TORCH_VERSION

pytestmark = pytest.mark.skipif(
    TORCH_VERSION < (2, 1), reason="lean needs torch 2.1; CI runs this on later ones"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=["operators", pytest.param("kernels", marks=runs_kernels)])
def any_way(request, monkeypatch):
    """Each test twice: in PyTorch's operators, and in Triton's kernels, as on a GPU."""
    monkeypatch.setattr(lean, "_runs_kernels", lambda x: request.param == "kernels")
    if request.param == "kernels" and DEVICE == "cpu":
        from lpln_autopatch.backends.fused import launch

        # Large tiles, few programs: the interpreter runs one after the other.
        monkeypatch.setattr(launch, "_tile", lambda n, looped: (64, 1 << (n - 1).bit_length(), 4))
    with torch.device(DEVICE):
        yield request.param


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


def run(x, weight, bias, dy, dtype=BF16, normalise=lean.normalise):
    """Output and gradients of all that there are."""
    y = normalise(x, (x.shape[-1],), weight, bias, 1e-5, dtype)
    if normalise is lean.normalise:
        name = "_FusedLayerNorm" if lean._runs_kernels(x) else "_LeanLayerNorm"
        assert name in type(y.grad_fn).__name__
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
    storages, y = kept_storages(lambda: lean.normalise(x, x.shape[-1:], weight, bias, 1e-5, BF16))
    return y.untyped_storage().data_ptr() in storages


# --- values, dtypes, gradients


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("parameter_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16])
def test_output_is_float32s_rounded_once(x_dtype, parameter_dtype, dtype):
    """Output: the float32 result, rounded once; the same bits with and without gradients."""
    torch.manual_seed(0)
    x = torch.randn(9, 64).to(x_dtype).requires_grad_()
    weight, bias = (torch.nn.Parameter(t.to(parameter_dtype)) for t in parameters())
    with autocast(dtype):
        y, *gradients = run(x, weight, bias, torch.randn(9, 64).to(dtype), dtype)
        with torch.no_grad():
            assert torch.equal(lean.normalise(x, (64,), weight, bias, 1e-5, dtype), y)
    in_float32 = torch.layer_norm(x.float(), (64,), weight.float(), bias.float(), 1e-5)
    assert y.dtype is dtype
    assert torch.equal(y, in_float32.to(dtype))
    assert [g.dtype for g in gradients] == [x_dtype, parameter_dtype, parameter_dtype]


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("bias_over_weight", [None, 1, 5, 5.9, 50])
def test_gradients_are_closer_than_composers(any_way, x_dtype, bias_over_weight):
    """dx is below the recipe's 1.8e-3, dweight within 1.2e-2 even beside a large bias."""
    torch.manual_seed(0)
    weight, bias = parameters(768, bias_over_weight)
    x = (torch.randn(1024, 768) + 1).to(x_dtype).requires_grad_()
    dy = torch.randn(1024, 768).to(BF16)
    y, dx, dweight, dbias = run(x, weight, bias, dy)
    y_exact, dx_exact, dweight_exact, dbias_exact = exact(x, weight, bias, dy)
    rounds = x.is_cuda and x_dtype is BF16 and any_way == "operators"  # weight and bias, too
    assert error(y, y_exact) < (2.6e-3 if rounds else 1.8e-3)
    assert error(dx, dx_exact) < 1.8e-3
    if x_dtype is FP32:  # else dx itself is rounded
        assert error(dx, dx_exact) < 7e-4
    assert error(dweight, dweight_exact) < (1.2e-2 if bias_over_weight else 2e-3)
    assert error(dbias, dbias_exact) < 1e-6


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_without_parameters_y_is_xhat(any_way, x_dtype):
    """Neither weight nor bias: y and 1 / std are all that is kept."""
    torch.manual_seed(0)
    x = torch.randn(64, 768).to(x_dtype).requires_grad_()
    dy = torch.randn(64, 768).to(BF16)
    y, dx = run(x, None, None, dy)
    assert error(dx, exact(x, None, None, dy)[1]) < 1.8e-3
    storages, y = kept_storages(lambda: lean.normalise(x, (768,), None, None, 1e-5, BF16))
    statistics = 2 if any_way == "kernels" else 1  # of a row: the mean, too
    assert sum(storages.values()) == y.nbytes + statistics * 64 * 4


@pytest.mark.usefixtures("any_way")
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
        for f in (lean.normalise, native.normalise)
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients_are_computed(frozen):
    """Any of x, weight and bias may want no gradient, and gets none."""
    torch.manual_seed(0)
    leaves = [torch.randn(4, 64).requires_grad_(), *parameters()]
    leaves[frozen].requires_grad_(False)
    lean.normalise(leaves[0], (64,), *leaves[1:], 1e-5, BF16).float().square().sum().backward()
    assert [t.grad is None for t in leaves] == [i == frozen for i in range(3)]


# --- weights from which xhat cannot be recovered


@pytest.mark.usefixtures("any_way")
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


@pytest.mark.usefixtures("any_way")
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
    off = torch.finfo(dtype).eps / 2 * (xhat.abs() + recovery.WORST_RATIO) + 1e-5
    assert ((dweight - dweight_exact).abs() <= (dy.abs() * off).sum(0)).all()
    along = (weight.abs() * dy.abs()).mean(-1, keepdim=True) * (xhat.abs().amax(-1, True) + 1)
    rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    assert ((dx - dx_exact).abs() <= 4 * rstd * along * off.amax(-1, True) + 1e-30).all()


@pytest.mark.usefixtures("any_way")
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


@runs_kernels
@pytest.mark.parametrize("count", [0, 12, 25])
def test_rows_longer_than_a_block(count, monkeypatch):
    """The kernels that go over a row in blocks recover xhat, too."""
    from lpln_autopatch.backends.fused import launch

    monkeypatch.setattr(lean, "_runs_kernels", lambda x: True)
    monkeypatch.setattr(launch, "_tile", lambda n, looped: (4, 128, 4))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        weight, bias = parameters(768)
        with_weights(weight, count, 0.0)
        x = torch.randn(30, 768, requires_grad=True)
        dy = torch.randn(30, 768).to(BF16)
        _, *gradients = run(x, weight, bias, dy)
        assert keeps_y(x, weight, bias) == (count < 24)
    for got, expected in zip(gradients, exact(x, weight, bias, dy)[1:], strict=True):
        assert error(got, expected) < 3e-3


# --- what is kept


def test_the_output_is_what_is_kept(any_way):
    """No x: y itself, 1 / std, the parameters, and 1/32 of xhat."""
    weight, bias = parameters(768)
    for x_dtype in (FP32, BF16):
        x = torch.randn(512, 768).to(x_dtype).requires_grad_()
        storages, y = kept_storages(lambda x=x: lean.normalise(x, (768,), weight, bias, 1e-5, BF16))
        assert y.untyped_storage().data_ptr() in storages
        assert x.untyped_storage().data_ptr() not in storages
        beside = 512 * 4 + 24 * 512 * 2 + 24 * 8 + 3 * 768 * 4
        if any_way == "kernels":  # the mean, too, the bias, and of each feature its place
            beside = 2 * 512 * 4 + 24 * 512 * 2 + 5 * 768 * 4 + 4
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


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("why", ["a replica's", "capturing", "another device"])
def test_where_nothing_is_counted_xhat_is_kept(why, monkeypatch):
    """A weight that is no Parameter, a CUDA graph's capture, other devices: right, and no y."""
    torch.manual_seed(0)
    weight, bias = parameters()
    if why == "a replica's":
        weight = weight * 1
    if why == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

        class OnCuda(torch.nn.Parameter):
            is_cuda = True

        assert recovery.counter(OnCuda(weight)) is None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert recovery.counter(OnCuda(weight)) is not None
    if why == "another device":
        assert recovery.counter(torch.nn.Parameter(weight.to("meta"))) is None
    for module in (lean, recovery):
        monkeypatch.setattr(module, "counter", lambda weight: None)
    x = torch.randn(256, 64, requires_grad=True)
    assert not keeps_y(x, weight, bias)
    dy = torch.randn(256, 64).to(BF16)
    _, dx, dweight, _ = run(x, weight, bias, dy)
    assert error(dx, exact(x, weight, bias, dy)[1]) < 1e-3
    assert error(dweight, exact(x, weight, bias, dy)[2]) < 2e-3


@pytest.fixture
def counts_arrive_late(monkeypatch):
    """As on CUDA: nothing waits for a count but the first of a parameter; who waited is listed."""
    waited = []

    def pinned(count):
        waited.append(count.item())
        return count.clone()

    for module in (lean, recovery):
        monkeypatch.setattr(module, "counter", lambda weight: partial(recovery._were_few, weight))
    monkeypatch.setattr(recovery, "_pinned", pinned)
    recovery._counts.cache_clear()
    yield waited
    recovery._counts.cache_clear()


@pytest.mark.usefixtures("any_way")
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


@pytest.mark.usefixtures("any_way")
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


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_count_that_arrives_before_recomputation_does_no_harm(counts_arrive_late, use_reentrant):
    """Forward kept y, its recomputation keeps xhat: the gradients are right."""
    torch.manual_seed(0)
    weight, bias = parameters(768)
    x = torch.randn(256, 768, requires_grad=True)
    dy = torch.randn(256, 768).to(BF16)
    run(x, weight, bias, dy)
    with_weights(weight, 20, 0.0)
    arrived = recovery._counts()[weight]

    def block(x):
        return lean.normalise(x, (768,), weight, bias, 1e-5, BF16)

    y = checkpoint(block, x, use_reentrant=use_reentrant)
    if not use_reentrant:  # that has run its forward without gradients
        assert arrived.item() == 20
    y.backward(dy)
    _, dx_exact, dweight_exact, _ = exact(x, weight, bias, dy)
    assert error(x.grad, dx_exact) < 1e-3
    assert error(weight.grad, dweight_exact) < 2e-3


@pytest.mark.usefixtures("any_way")
def test_counts_are_forgotten_with_the_parameter(counts_arrive_late):
    """No parameter is kept alive, and a new one of its address is counted anew."""
    weight, bias = parameters()
    run(torch.randn(4, 64, requires_grad=True), weight, bias, torch.randn(4, 64).to(BF16))
    assert len(recovery._counts()) == 1
    del weight
    assert len(recovery._counts()) == 0


# --- whatever else autograd is asked for


@pytest.mark.usefixtures("any_way")
def test_output_modified_in_place_is_an_error():
    """y is kept: backward refuses it once it has been changed, as PyTorch's own nodes do."""
    weight, bias = parameters()
    x = torch.randn(4, 64, requires_grad=True)
    for change in (lambda y: y.add_(1), lambda y: y.detach().zero_()):
        y = lean.normalise(x, (64,), weight, bias, 1e-5, BF16)
        change(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.usefixtures("any_way")
def test_input_modified_in_place_is_none():
    """x is not kept: what happens to it after the call is nobody's business."""
    weight, bias = parameters()
    x = torch.randn(4, 64, requires_grad=True)
    dy = torch.randn(4, 64).to(BF16)
    copied = x * 1
    y = lean.normalise(copied, (64,), weight, bias, 1e-5, BF16)
    copied.zero_()
    assert torch.equal(torch.autograd.grad(y, [x], dy)[0], run(x, weight, bias, dy)[1])


@pytest.mark.usefixtures("any_way")
def test_bias_may_change_before_backward():
    """A float32 bias that changes between forward and backward changes no gradient, as in stock."""
    x, (weight, bias) = torch.randn(16, 64, requires_grad=True), parameters()
    dy = torch.randn(16, 64).to(BF16)
    _, *expected = run(x, weight, bias, dy)
    y = lean.normalise(x, (64,), weight, bias, 1e-5, BF16)
    bias.data.mul_(3)
    for got, right in zip(torch.autograd.grad(y, [x, weight, bias], dy), expected, strict=True):
        assert torch.equal(got, right)


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("few", [True, False])
def test_second_derivatives(few):
    """Double backward, against float64, with weights of 0 among them, whatever is kept."""
    torch.manual_seed(0)
    weight, bias = parameters()
    with_weights(weight, 1 if few else 9, 0.0, 1e-8)
    x = torch.randn(5, 7, 64, requires_grad=True)
    assert keeps_y(x, weight, bias) is few
    v = torch.randn(5, 7, 64)

    def second(function, leaves, dtype):
        y = function(*leaves).to(dtype)
        gradients = torch.autograd.grad((y * y * v.to(dtype)).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g.to(dtype) ** 2).sum() for g in gradients), leaves)

    got = second(
        lambda x, w, b: lean.normalise(x, (64,), w, b, 1e-5, BF16), [x, weight, bias], FP32
    )
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = second(
        lambda x, w, b: torch.layer_norm(x, (64,), w, b, 1e-5), doubles, torch.float64
    )
    assert [g.dtype for g in got] == [FP32] * 3
    assert max(error(g, e) for g, e in zip(got, expected, strict=True)) < 1e-2


@pytest.mark.usefixtures("any_way")
def test_batched_gradients():
    """is_grads_batched: vmap runs through backward."""
    torch.manual_seed(0)
    weight, bias = parameters()
    x = torch.randn(4, 64, requires_grad=True)
    y = lean.normalise(x, (64,), weight, bias, 1e-5, BF16)
    dy = torch.randn(3, 4, 64).to(BF16)
    leaves = [x, weight, bias]
    got = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(y, leaves, dy[i], retain_graph=True)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g[i], e)


@pytest.mark.usefixtures("any_way")
def test_functorch_and_forward_mode_go_to_native():
    """torch.func's grad, vmap and jvp, and dual numbers: native's values."""
    torch.manual_seed(0)
    weight, bias = (t.detach() for t in parameters())
    x, t = torch.randn(2, 4, 64)

    def total(function, x):
        return function(x, (64,), weight, bias, 1e-5, BF16).float().square().sum()

    def results(function):
        f = lambda x: function(x, (64,), weight, bias, 1e-5, BF16)  # noqa: E731
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t)))
        return [
            torch.func.grad(lambda x: total(function, x))(x),
            torch.func.vmap(f)(x),
            *torch.func.jvp(f, (x,), (t,)),
            *dual,
        ]

    for got, expected in zip(results(lean.normalise), results(native.normalise), strict=True):
        assert torch.equal(got, expected)


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


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_inference_tensor_can_be_trained_on(x_dtype):
    """An input made in inference mode: x is not saved, so autograd does not mind."""
    with torch.inference_mode():
        x = torch.randn(4, 64, dtype=x_dtype)
    weight, bias = parameters()
    y = lean.normalise(x, (64,), weight, bias, 1e-5, BF16)
    dweight, dbias = torch.autograd.grad(y.sum(), [weight, bias])
    assert error(dbias, torch.full((64,), 4.0).double()) < 1e-6
    assert dweight.isfinite().all()
    with torch.inference_mode():
        assert lean.normalise(x, (64,), weight, bias, 1e-5, BF16).is_inference()


@pytest.mark.usefixtures("any_way")
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
        y = lean.normalise(x, (64,), weight, bias, 1e-5, BF16)
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


def test_a_dispatch_mode_sees_what_runs():
    """A mode that counts operators sees lean's: it is no reason to run something else."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    weight, bias = parameters()
    with Mode():
        y = lean.normalise(torch.randn(4, 64), (64,), weight, bias, 1e-5, BF16)
    assert "_LeanLayerNorm" in type(y.grad_fn).__name__


def test_meta_tensors_run():
    """Nothing depends on data on a device where nothing is counted."""
    weight, bias = (torch.nn.Parameter(t.to("meta")) for t in parameters())
    x = torch.randn(4, 64, device="meta", requires_grad=True)
    y, *gradients = run(x, weight, bias, torch.empty(4, 64, device="meta", dtype=BF16))
    assert y.dtype is BF16
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]


# --- by name, by surgery, compiled, and refused


def test_bad_input_is_pytorchs_own_error():
    """A shape that does not fit, an integer of a shape: the messages of torch.layer_norm."""
    weight, bias = parameters()
    x = torch.randn(4, 64, requires_grad=True)
    for arguments in (
        (x, (63,), weight, bias),
        (x, (64,), weight[:5], bias),
        (x, (64,), weight, bias[:5]),
        (x, (), weight, bias),
        (x, 64, weight, bias),
        (x, (64,), weight.to("meta"), bias),
    ):
        with pytest.raises((RuntimeError, TypeError)) as expected:
            torch.layer_norm(*arguments, 1e-5)
        with pytest.raises(type(expected.value)) as got:
            lean.normalise(*arguments, 1e-5, BF16)
        assert str(got.value) == str(expected.value)


def test_empty_inputs():
    """No rows: native's."""
    weight, bias = parameters()
    y = lean.normalise(torch.randn(0, 64), (64,), weight, bias, 1e-5, BF16)
    assert y.shape == (0, 64)
    assert y.dtype is BF16
    y.sum().backward()
    assert (weight.grad == 0).all()


def test_named_by_every_way(layer_norm):
    """enable, a block, the variable, surgery and the doctor know it."""
    from lpln_autopatch import backends, doctor

    lpln.enable(backend="lean")
    assert lpln.status().backend == "lean"
    with autocast():
        y = layer_norm(torch.randn(4, 8))
    assert "_LeanLayerNorm" in type(y.grad_fn).__name__
    assert "lean" in backends.names()
    assert doctor.diagnose()["backends"]["lean"]["usable"]
    code = "import torch, lpln_autopatch; print(lpln_autopatch.status().backend)"
    variables = {"LPLN_PRECISION": "amp", "LPLN_BACKEND": "lean"}
    if TORCH_VERSION >= (2, 5):
        assert run_python("-c", code, **variables).stdout == "lean\n"


def test_old_torch_is_told(monkeypatch):
    """Before torch 2.1: an ImportError that says so."""
    monkeypatch.setattr(lean, "TORCH_VERSION", (2, 0))
    with pytest.raises(ImportError, match=r"backend='lean': it needs torch 2\.1 or later"):
        lpln.enable(backend="lean")


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
            assert "_LeanLayerNorm" in type(other(x).grad_fn).__name__
    assert vars(model[0].weight) == {}


@needs_dynamo
def test_compiled_code_follows():
    """fullgraph, on and off, one compilation for each; behind a graph break lean itself runs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    norm = torch.nn.LayerNorm(64)
    x = torch.randn(8, 64, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: norm(x.sin()) * 2, backend=counter, fullgraph=True)
    for _ in range(2):
        with low_precision_layernorm("bf16", backend="lean"), autocast():
            y = compiled(x)
        assert y.dtype is BF16
        y.float().sum().backward()
        with autocast():
            assert compiled(x).dtype is FP32
    assert counter.frame_count == 2

    @torch.compile(backend=counter)
    def broken(x):
        for _ in range(1):  # a frame that Dynamo gives up
            torch._dynamo.graph_break()
            x = norm(x)
        return x

    with low_precision_layernorm("bf16", backend="lean"), autocast():
        y = broken(x)
    assert "_LeanLayerNorm" in type(y.grad_fn).__name__
    if TORCH_VERSION >= (2, 6):  # older ones compile what lean calls
        assert counter.frame_count == 2


@needs_dynamo
def test_compiled_code_keeps_y_where_it_is_xhat():
    """Without weight and bias a graph keeps less than native's; the gradient is as close."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(64, elementwise_affine=False)
    linear = torch.nn.Linear(64, 64)
    x = torch.randn(32, 64, requires_grad=True)

    def kept_and_gradient(backend):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: x + linear(norm(x)), backend="aot_eager_decomp_partition", fullgraph=True
        )
        with low_precision_layernorm("bf16", backend=backend), autocast():
            compiled(x)
            storages, y = kept_storages(lambda: compiled(x))
        return sum(storages.values()), torch.autograd.grad(y.float().square().sum(), [x])[0]

    native_bytes, expected = kept_and_gradient("native")
    lean_bytes, got = kept_and_gradient("lean")
    assert lean_bytes < native_bytes
    assert error(got, expected.double()) < 5e-3


@needs_dynamo
@pytest.mark.parametrize("how", ["torch.func", "inside the graph", "export"])
def test_compiled_second_derivatives_are_natives(how):
    """Where Dynamo itself differentiates, or exports, the graph is native's."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(64, elementwise_affine=False)
    x = torch.randn(8, 64, requires_grad=True)

    def loss(x):
        return norm(x.sin()).float().pow(3).sum()

    def hessian(x):
        return torch.func.jacrev(torch.func.grad(loss))(x)

    def penalty(x):
        return torch.autograd.grad(loss(x), x, create_graph=True)[0].pow(2).sum()

    config = importlib.import_module("torch._dynamo.config")
    with low_precision_layernorm("bf16", backend="lean"), autocast():
        if how == "torch.func":
            compiled = torch.compile(hessian, backend="aot_eager", fullgraph=True)
            with low_precision_layernorm("bf16", backend="native"):
                expected = compiled(x.detach())
            assert torch.equal(compiled(x.detach()), expected)
        elif how == "export":
            exported = torch.export.export(UnderAutocast(norm), (x,), strict=True)
            graphs = [m for m in exported.graph_module.modules() if hasattr(m, "graph")]
            assert "aten.layer_norm" in "".join(str(m.graph) for m in graphs)
            assert exported.module()(x).dtype is torch.bfloat16
        elif not hasattr(config, "trace_autograd_ops"):
            pytest.skip("this Dynamo does not differentiate inside of a graph; the newest does")
        else:
            compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
            with config.patch(trace_autograd_ops=True):
                got, expected = (torch.autograd.grad(f(x), x)[0] for f in (compiled, penalty))
            assert error(got, expected.double()) < 2e-2
