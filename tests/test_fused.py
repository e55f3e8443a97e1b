"""The Triton backend: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import functools
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DEVICE, needs_gpu, run_elsewhere, run_forked, runs_kernels
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import TORCH_VERSION
from lpln_autopatch.backends import fused, gradients, native
from lpln_autopatch.backends.fused import grid

CUDA = torch.cuda.is_available()
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


rms = pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])


@pytest.fixture
def few_programs(monkeypatch):
    """Two multiprocessors, so that on a GPU too a program goes through several tiles."""
    from lpln_autopatch.backends.fused import plan

    monkeypatch.setattr(plan, "_multiprocessors", lambda device: 2)
    monkeypatch.setattr(fused, "_plans", {})


@pytest.fixture(params=["one block", "looped"])
def any_kernel(request, few_programs, monkeypatch):
    """Each test twice: as it is, and with the kernels for rows that are too long for one block."""
    if request.param == "looped":
        monkeypatch.setattr(grid, "ONE_BLOCK", 0)
        monkeypatch.setattr(grid, "LOOPED_FORWARD", (1, 64))
        monkeypatch.setattr(grid, "LOOPED_BACKWARD", (4, 32))


def arguments(shape, n_dims=1, x_dtype=FP32, parameters=FP32, weight=True, bias=True, mean=0.0):
    """x, normalized_shape, weight and bias, as leaves that want gradients."""
    x = (torch.randn(shape, device=DEVICE) + mean).to(x_dtype).requires_grad_()
    normalized_shape = tuple(shape[len(shape) - n_dims :])
    w = b = None
    if weight:
        w = (1 + 0.2 * torch.randn(normalized_shape, device=DEVICE)).to(parameters).requires_grad_()
    if bias:
        b = torch.randn(normalized_shape, device=DEVICE).to(parameters).requires_grad_()
    return x, normalized_shape, w, b


def run(x, normalized_shape, weight, bias, dtype=BF16, dy=None, eps=1e-5, rms=False):
    """Output and gradients of the backend, which must have used its kernels."""
    if rms:
        y = fused.fused.rms_norm(x, normalized_shape, weight, eps, dtype)
    else:
        y = fused.fused(x, normalized_shape, weight, bias, eps, dtype)
    assert "FusedNorm" in type(y.grad_fn).__name__
    leaves = [t for t in (x, weight, bias) if t is not None]
    dy = torch.randn(y.shape, device=DEVICE, dtype=dtype) if dy is None else dy
    return dy, y, *torch.autograd.grad(y, leaves, dy)


def exact(x, normalized_shape, weight, bias, dy, eps=1e-5, rms=False):
    """The same, in float64."""
    leaves = [None if t is None else t.detach().double() for t in (x, weight, bias)]
    wanted = [t.requires_grad_() for t in leaves if t is not None]
    x, weight, bias = leaves
    if rms:
        y = torch.nn.functional.rms_norm(x, normalized_shape, weight, eps)
    else:
        y = torch.nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)
    return [y, *torch.autograd.grad(y, wanted, dy.double())]


def assert_rounded_once(results, expected):
    """Each result is no further from float64 than float64 rounded once, or float32's noise."""
    for result, value in zip(results, expected, strict=True):
        rounded = value.to(result.dtype).double()
        noise = 2e-6 * (value.norm() + value.numel() ** 0.5)
        distance = (result.double() - value).norm()
        assert distance <= 1.02 * (rounded - value).norm() + noise


def check(x, normalized_shape, weight, bias, dtype=BF16, rms=False):
    dy, *results = run(x, normalized_shape, weight, bias, dtype, rms=rms)
    assert results[0].dtype is dtype
    assert results[0].shape == x.shape
    leaves = [t for t in (x, weight, bias) if t is not None]
    assert [g.dtype for g in results[1:]] == [t.dtype for t in leaves]
    assert_right(x, dtype, results, exact(x, normalized_shape, weight, bias, dy, rms=rms))


def assert_right(x, dtype, results, expected):
    """Rounded once; but the gradients for a float32 x come from a rounded xhat."""
    if x.dtype is FP32:
        for result, value in zip(results[1:], expected[1:], strict=True):
            limit = max(torch.finfo(d).eps for d in (dtype, result.dtype)) / 2
            # Of two features the gradient is all but 0, the difference of two that are not.
            noise = (limit if x.shape[-1] == 2 else 1e-5) * value.numel() ** 0.5
            assert (result.double() - value).norm() <= limit * value.norm() + noise
        results, expected = results[:1], expected[:1]
    assert_rounded_once(results, expected)


def test_float64_parameters_are_not_the_kernels():
    """Native refuses them with PyTorch's own error, and stock: the kernels do not take them."""
    x, weight = torch.randn(4, 8), torch.ones(8)
    assert gradients.takes(x, (8,), weight, None)
    assert not gradients.takes(x, (8,), weight.double(), None)


@runs_kernels
@rms
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("parameters", [FP32, BF16, FP16])
@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16])
def test_every_dtype_is_rounded_once(x_dtype, parameters, dtype, rms):
    """The output is float64's, rounded once, for every mix of dtypes, and so are the gradients.

    Those for a float32 x come from a rounded xhat.
    """
    torch.manual_seed(0)
    case = arguments((37, 100), x_dtype=x_dtype, parameters=parameters, bias=not rms)
    check(*case, dtype, rms)


@runs_kernels
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True, "an RMSNorm, which has none"])
def test_parameters_may_be_missing(any_kernel, weight, bias):
    """Without weight, without bias, without both, in each of the kernels."""
    torch.manual_seed(0)
    rms = isinstance(bias, str)
    check(*arguments((9, 100), weight=weight, bias=bias is True, mean=1.0), rms=rms)


SHAPES = [
    ((300, 1), 1),
    ((1, 2), 1),
    ((64,), 1),
    ((5000, 3), 1),
    ((2, 3, 4, 25), 2),
    ((2, 3, 4), 3),
    ((1, 1, 768), 1),
    ((90, 768), 1),
    ((50, 2048), 1),
    ((9, 8192), 1),
    ((9, 8193), 1),
    ((1, 65536), 1),
]


@runs_kernels
@rms
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("shape", "n_dims"), SHAPES)
def test_edge_shapes(shape, n_dims, rms):
    """One feature, one row, odd sizes, both sides of every change of kernel, the longest row."""
    torch.manual_seed(0)
    check(*arguments(shape, n_dims, mean=1.0, bias=not rms), rms=rms)


@runs_kernels
@settings(
    max_examples=200 if CUDA else 12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 30),
    features=st.integers(1, 300),
    x_dtype=st.sampled_from([FP32, BF16, FP16]),
    dtype=st.sampled_from([BF16, FP16]),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 9),
)
def test_any_size_is_rounded_once(any_kernel, rows, features, x_dtype, dtype, mean, seed):
    """The claim of the dtypes, for sizes, means and values that nobody chose."""
    torch.manual_seed(seed)
    x, *rest = arguments((rows, features), x_dtype=x_dtype, mean=mean)
    dy, y, *_ = run(x, *rest, dtype)
    # The mean's rounding error is float32's, relative to the mean, whoever computes it.
    expected, *_ = exact(x, *rest, dy)
    rounded = (expected.to(dtype).double() - expected).norm()
    noise = 2e-6 * (1 + mean) * (expected.norm() + expected.numel() ** 0.5)
    assert (y.double() - expected).norm() <= 1.02 * rounded + noise


@runs_kernels
@pytest.mark.parametrize("features", [1000, 20000])
def test_large_mean_does_not_cancel(features):
    """Variance 1 around a mean of 4096: E[x^2] - E[x]^2 would lose it all in float32."""
    torch.manual_seed(0)
    x, *rest = arguments((4, features), mean=4096.0)
    dy, *results = run(x, *rest, FP16)
    for result, value in zip(results, exact(x, *rest, dy), strict=True):
        assert (result.double() - value).norm() < 2e-3 * value.norm()


@runs_kernels
def test_input_beyond_float16_is_not_rounded():
    """x is not rounded to the autocast dtype: 1e6 is not infinite under float16."""
    x, *rest = arguments((4, 64))
    check((x.detach() * 1e6).requires_grad_(), *rest, FP16)


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1),
    "every second, every third": lambda x: x[::2, 1::3],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1),
    "part of the features": lambda x: x[..., 8:40],
    "features not contiguous": lambda x: x.transpose(1, 2),
    "three strides": lambda x: x.unflatten(0, (2, 3)).permute(1, 0, 2, 3),
    "a row of a column": lambda x: x[:, 0, :],
}


@runs_kernels
@rms
@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_x_and_of_dy(view, rms):
    """Any strides, of the input and of the gradient that comes in."""
    torch.manual_seed(0)
    whole = torch.randn(6, 7, 64, device=DEVICE)
    x = VIEWS[view](whole).detach().requires_grad_()
    assert not x.is_contiguous()
    _, *rest = arguments(x.shape, bias=not rms)
    dy = VIEWS[view](torch.randn(6, 7, 64, device=DEVICE, dtype=BF16))
    _, *results = run(x, *rest, dy=dy, rms=rms)
    assert_right(x, BF16, results, exact(x, *rest, dy, rms=rms))


@runs_kernels
@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_the_leading_dimensions_are_not_copied(view):
    """x is read where it lies, unless its rows do, or it has three strides or more."""
    x = VIEWS[view](torch.randn(6, 7, 64, device=DEVICE))
    read, (inner, outer_stride, inner_stride) = grid.layout(x, 1, x.shape[-1])
    copied = view in ("features not contiguous", "three strides")
    assert (read.data_ptr() == x.data_ptr()) is not copied
    for row, expected in enumerate(x.flatten(0, -2)):
        begin = row // inner * outer_stride + row % inner * inner_stride
        got = read.as_strided((x.shape[-1],), (1,), read.storage_offset() + begin)
        assert torch.equal(got, expected)


@runs_kernels
def test_what_differs_in_one_thing_has_a_plan_of_its_own(monkeypatch):
    """Every part of a call's kind, in turn, twice, by both backends, and each time right."""
    monkeypatch.setattr(fused, "_plans", {})
    torch.manual_seed(0)
    x = torch.randn(6, 64, device=DEVICE)
    w, b = (torch.nn.Parameter(torch.rand(64, device=DEVICE) + 0.5) for _ in range(2))
    square = torch.nn.Parameter(torch.rand(8, 8, device=DEVICE) + 0.5)
    column = torch.nn.Parameter(torch.rand(8, device=DEVICE) + 0.5)
    calls = [
        (x, w, b, 1e-5, BF16),
        (x[:5], w, b, 1e-5, BF16),
        (x[:3], w, b, 1e-5, BF16),
        (x[::2], w, b, 1e-5, BF16),
        (x.view(2, 3, 64), w, b, 1e-5, BF16),
        (x.view(6, 8, 8), column, None, 1e-5, BF16),
        (x.view(6, 8, 8), square, None, 1e-5, BF16),
        (x.to(BF16), w, b, 1e-5, BF16),
        (x, w, b, 1e-1, BF16),
        (x, w, b, 1e-5, FP16),
        (x, torch.nn.Parameter(w.detach().to(BF16)), b, 1e-5, BF16),
        (x, w, torch.nn.Parameter(b.detach().to(BF16)), 1e-5, BF16),
        (x, w, None, 1e-5, BF16),
        (x, None, None, 1e-5, BF16),
    ]
    for _ in range(2):
        for backend in (fused.fused, fused.lean):
            for call in calls:
                run_call(backend, *call)
            run_call(backend, x, w, None, 1e-5, BF16, rms=True)
        assert len(fused._plans) == 2 * (len(calls) + 1)
    assert goes_native(x, (64,), torch.ones(128, device=DEVICE)[::2], b)
    assert goes_native(x, (64,), torch._neg_view(w.detach()), b)


def run_call(backend, x, weight, bias, eps, dtype, rms=False):
    """A call by a backend is right, and so is its gradient of x."""
    x = x.detach().requires_grad_()
    shape = (64,) if weight is None else tuple(weight.shape)
    run = backend.rms_norm if rms else backend
    y = run(x, shape, *((weight,) if rms else (weight, bias)), eps, dtype)
    assert y.dtype is dtype
    assert "FusedNorm" in type(y.grad_fn).__name__
    dy = torch.randn(y.shape, device=DEVICE, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    y_exact, dx_exact, *_ = exact(x, shape, weight, bias, dy, eps, rms)
    assert_rounded_once([y], [y_exact])
    assert (dx.double() - dx_exact).norm() < 4e-3 * dx_exact.norm()


@runs_kernels
def test_plans_are_dropped_when_there_are_too_many(monkeypatch):
    """A program whose sizes and strides never come again keeps a limited number of plans."""
    from lpln_autopatch.backends.fused import plan

    monkeypatch.setattr(fused, "_plans", {})
    monkeypatch.setattr(fused, "_MOST_PLANS", 3)
    for rows in range(1, 8):
        check(*arguments((rows, 8)))
    assert len(fused._plans) == 1
    (last,) = fused._plans.values()
    monkeypatch.setattr(plan, "_MOST_LAUNCHES", 3)
    case = arguments((7, 8))
    for stride in range(9, 16):
        dy = torch.randn(7, stride, device=DEVICE, dtype=BF16)[:, :8]
        _, *results = run(*case, dy=dy)
        assert_right(case[0], BF16, results, exact(*case, dy))
    assert len(last._backward_launches) <= 3


@runs_kernels
@pytest.mark.parametrize("backend", [fused.fused, fused.lean])
@pytest.mark.parametrize("change", ["a parameter is freed", "x is freed", "a hook cuts"])
def test_other_sizes_in_backward_are_an_error(backend, change):
    """Parameters and activations without memory, as ZeRO leaves them: nothing is overwritten."""
    x, shape, w, b = arguments((4, 64), x_dtype=BF16)
    w = torch.nn.Parameter(w.detach())
    cut = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t[..., :1].contiguous() if change == "a hook cuts" else t
    )
    with cut:
        y = backend(x, shape, w, b, 1e-5, BF16)
    if change == "a parameter is freed":
        w.data = torch.empty(0, device=DEVICE)
    if change == "x is freed":
        if backend is fused.lean:
            b.data = torch.empty(0, device=DEVICE)  # x is not kept
        else:
            x.data = torch.empty(0, device=DEVICE, dtype=BF16)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, [x, w, b], torch.ones_like(y))


@runs_kernels
def test_parameter_that_has_leaked_out_of_a_transform_goes_native():
    """A dead wrapper of torch.func, which has no memory of its own."""
    x, shape, w, b = arguments((4, 8))
    leaked = []
    torch.func.grad(lambda w: leaked.append(w) or w.sum())(w.detach())
    assert goes_native(x, shape, leaked[0], b)


@runs_kernels
def test_offsets_have_64_bits():
    """Rows further apart than 2**31 elements are read and normalised."""
    features = 64
    memory = torch.empty(2**31 + features, dtype=FP16, device=DEVICE)  # only two rows are touched
    x = memory.as_strided((2, features), (2**31, 1))
    x.copy_(torch.randn(2, features))
    check(x.detach().requires_grad_(), *arguments((2, features))[1:])


@runs_kernels
def test_two_runs_agree_bit_for_bit(any_kernel):
    """Forward and backward are deterministic: no atomics."""
    torch.manual_seed(0)
    inputs = arguments((40, 96))
    dy, *first = run(*inputs)
    _, *second = run(*inputs, dy=dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs_kernels
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_only_the_wanted_gradients(any_kernel, wanted, monkeypatch):
    """What needs no gradient is not computed, and the others are what they are together."""
    from lpln_autopatch.backends.fused.plan import Plan

    torch.manual_seed(0)
    x, shape, w, b = arguments((9, 100))
    dy, _, *together = run(x, shape, w, b)
    leaves = [x, w, b]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    computed = []
    backward = Plan.backward
    monkeypatch.setattr(
        Plan, "backward", lambda *args: computed.append(backward(*args)) or computed[0]
    )
    y = fused.fused(x, shape, w, b, 1e-5, BF16)
    alone = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
    assert all(torch.equal(a, together[i]) for a, i in zip(alone, wanted, strict=True))
    assert [g is not None for g in computed[0]] == [i in wanted for i in range(3)]


@runs_kernels
@pytest.mark.parametrize("x_dtype", [BF16, FP32])
def test_saved_for_backward_is_16_bits_an_element_and_a_float_or_two_a_row(any_kernel, x_dtype):
    """A bfloat16 x itself; of a float32 x, xhat rounded to the autocast dtype."""
    saved = []
    x, *rest = arguments((16, 64), x_dtype=x_dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.fused(x, *rest, 1e-5, BF16)
    pointers = {t.data_ptr() for t in (x, *rest[1:])}
    others = {(tuple(t.shape), t.dtype): t for t in saved if t.data_ptr() not in pointers}
    xhat = {((16, 64), BF16)} if x_dtype is FP32 else set()
    assert set(others) == {((1 if xhat else 2, 16), FP32), *xhat}
    assert len(saved) == 3
    for key in xhat:
        expected = torch.nn.functional.layer_norm(x.detach().double(), (64,))
        assert_rounded_once([others[key]], [expected])


@runs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_values_are_the_same(mode):
    """no_grad and inference_mode change no bit."""
    x, *rest = arguments((9, 100))
    y = fused.fused(x, *rest, 1e-5, BF16)
    with mode():
        assert torch.equal(fused.fused(x, *rest, 1e-5, BF16), y)


@runs_kernels
@pytest.mark.parametrize("missing", [None, "weight", "bias", "centre"])
def test_second_derivatives_from_a_kept_x(missing):
    """A low-precision x is kept: double backward agrees with float64's."""
    torch.manual_seed(0)
    rms = missing == "centre"
    leaves = {"weight": missing != "weight", "bias": missing != "bias" and not rms}
    x, shape, w, b = arguments((5, 16), x_dtype=FP16, **leaves)

    def second(normalise, *leaves):
        wanted = [t for t in leaves if t is not None]
        y = normalise(*leaves).double()
        first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.double().pow(2).sum() for g in first), wanted)

    def ours(x, w, b):
        if rms:
            return fused.fused.rms_norm(x, shape, w, 1e-5, FP16)
        return fused.fused(x, shape, w, b, 1e-5, FP16)

    def reference(x, w, b):
        if rms:
            return torch.nn.functional.rms_norm(x, shape, w, 1e-5)
        # PyTorch's own double backward fails with a bias and no weight.
        ones = torch.ones(shape, dtype=FP64, device=DEVICE)
        return torch.nn.functional.layer_norm(x, shape, ones if w is None else w, b)

    doubles = [None if t is None else t.detach().double().requires_grad_() for t in (x, w, b)]
    for result, value in zip(second(ours, x, w, b), second(reference, *doubles), strict=True):
        assert (result.double() - value).norm() < 5e-3 * value.norm()


@runs_kernels
@pytest.mark.parametrize("backend", [fused.fused, fused.lean])
def test_second_derivatives_without_x_are_an_error(backend):
    """Without an x, create_graph is an error that names native, at once: never a wrong result."""
    x, shape, w, b = arguments((5, 16))
    y = backend(x, shape, torch.nn.Parameter(w.detach()), b, 1e-5, BF16)
    with pytest.raises(RuntimeError, match='backend="native"'):
        torch.autograd.grad(y.float().sum(), [x, b], create_graph=True)


def goes_native(x, *rest):
    y = fused.fused(x, *rest, 1e-5, BF16)
    if "FusedNorm" in str(y.grad_fn):
        return False
    assert torch.equal(y, native.normalise(x, *rest, 1e-5, BF16))
    return True


@runs_kernels
def test_what_the_kernels_do_not_take_goes_native():
    """Empty inputs, rows too long, float8, subclasses, parameters with strides of their own."""

    class Tensor(torch.Tensor):
        pass

    x, shape, w, b = arguments((4, 8))
    assert goes_native(*arguments((0, 8)))
    assert goes_native(*arguments((1, 65537)))
    assert goes_native(x.detach().to(torch.float8_e4m3fn), shape, w, b)
    assert goes_native(x.detach().as_subclass(Tensor), shape, w, b)
    assert goes_native(x, shape, torch.randn(16, device=DEVICE)[::2], b)
    assert goes_native(torch._neg_view(x.detach()), shape, w, b)
    assert goes_native(x, shape, torch._neg_view(w.detach()), b)
    assert not goes_native(x, [8], w, b)
    nested = torch.nested.as_nested_tensor([x.detach(), x.detach()[:3]])
    expected = native.normalise(nested, shape, w, b, 1e-5, BF16)
    got = fused.fused(nested, shape, w, b, 1e-5, BF16)
    assert all(torch.equal(g, e) for g, e in zip(got.unbind(), expected.unbind(), strict=True))


@runs_kernels
def test_inference_tensor_can_be_trained_on():
    """Autograd cannot save an inference tensor; in low precision stock makes a copy of it."""
    _, shape, w, b = arguments((4, 8))
    with torch.inference_mode():
        x = torch.randn(4, 8, device=DEVICE, dtype=BF16)
        kernel = fused.fused(x, shape, w, b, 1e-5, BF16)
    y = fused.fused(x, shape, w, b, 1e-5, BF16)
    torch.testing.assert_close(y, kernel)
    dy = torch.randn(4, 8, device=DEVICE, dtype=BF16)
    gradients = torch.autograd.grad(y, [w, b], dy)
    assert_rounded_once(gradients, exact(x, shape, w, b, dy)[2:])


@runs_kernels
@pytest.mark.parametrize("features", [1, 64])
def test_gradient_that_is_not_what_lies_in_memory(features):
    """A negative view and a zero without memory, as autograd passes them: right gradients."""
    torch.manual_seed(0)
    x, *rest = arguments((4, features))
    y = fused.fused(x, *rest, 1e-5, FP16)
    leaves = [x, *rest[1:]]
    dy = torch.randn(4, features, device=DEVICE, dtype=FP16)
    for upstream, plain in (
        (torch._neg_view(dy), dy.neg()),
        (torch._efficientzerotensor((4, features), dtype=FP16, device=DEVICE), dy * 0),
    ):
        got = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
        expected = torch.autograd.grad(y, leaves, plain, retain_graph=True)
        for g, e in zip(got, expected, strict=True):
            # For one feature 1 / sqrt(eps) stands in front of what is zero but for rounding.
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-3 if features == 1 else 1e-5)


@runs_kernels
def test_saved_tensors_may_come_back_with_other_strides():
    """Hooks that unpack a weight as an expanded view: nothing beyond it is read."""
    x, shape, _, b = arguments((4, 64))
    w = torch.ones(64, device=DEVICE, requires_grad=True)
    dy = torch.randn(4, 64, device=DEVICE, dtype=BF16)
    _, _, *expected = run(x, shape, w, b, dy=dy)

    def pack(t):
        return t[:1].clone() if t.shape == (64,) else t

    def unpack(t):
        return t.expand(64) if t.shape == (1,) else t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = fused.fused(x, shape, w, b, 1e-5, BF16)
    for got, e in zip(torch.autograd.grad(y, [x, w, b], dy), expected, strict=True):
        torch.testing.assert_close(got, e)


@runs_kernels
def test_wrong_shapes_get_pytorchs_own_error():
    """Memory beyond a parameter or a row is never read."""
    x, shape, w, b = arguments((4, 8))
    with pytest.raises(RuntimeError, match=r"normalized_shape=\[9\]"):
        fused.fused(x, (9,), torch.ones(9, device=DEVICE), None, 1e-5, BF16)
    with pytest.raises(RuntimeError, match="weight"):
        fused.fused(x, shape, w[:7], b, 1e-5, BF16)
    with pytest.raises(RuntimeError, match="at least 1-dimensional"):
        fused.fused(x[0, 0], (), None, None, 1e-5, BF16)
    with pytest.raises(TypeError, match="normalized_shape"):
        fused.fused(x, [[8]], None, None, 1e-5, BF16)


@runs_kernels
def test_transforms_and_modes_go_native():
    """torch.func, forward mode, batched gradients and fake tensors work, by native formulas."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, shape, w, b = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments((4, 8)))

    def f(x):
        return fused.fused(x, shape, w, b, 1e-5, BF16).float()

    def reference(x):
        return native.normalise(x, shape, w, b, 1e-5, BF16).float()

    assert torch.equal(torch.func.vmap(f)(x), reference(x))
    tangent = torch.randn_like(x)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.grad(lambda x: f(x).pow(2).sum())(x),
        lambda f: torch.func.jacrev(f)(x),
    ):
        torch.testing.assert_close(transform(f), transform(reference))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        got = forward_ad.unpack_dual(f(dual)).tangent
        torch.testing.assert_close(got, forward_ad.unpack_dual(reference(dual)).tangent)

    leaf = x.clone().requires_grad_()
    y, expected = f(leaf), reference(leaf)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(x), tangent)
        got, expected = (
            forward_ad.unpack_dual(torch.autograd.grad(y, leaf, dual)[0]).tangent
            for y in (y, expected)
        )
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    batch = torch.randn(3, 4, 8, device=DEVICE)
    got, expected = (
        torch.autograd.grad(g(leaf), leaf, batch, is_grads_batched=True)[0] for g in (f, reference)
    )
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = f(mode.from_tensor(x))
    assert type(y).__name__ == "FakeTensor"


@runs_kernels
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layernorm_runs_it(use_reentrant):
    """A LayerNorm under autocast runs the kernels, and again in a checkpoint's recomputation."""
    norm = torch.nn.LayerNorm(64, device=DEVICE)
    x = torch.randn(5, 64, device=DEVICE, requires_grad=True)
    with low_precision_layernorm("bf16", backend="fused"), torch.autocast(DEVICE, dtype=BF16):
        y = norm(x)
        again = checkpoint(norm, x, use_reentrant=use_reentrant)
    assert "FusedNorm" in type(y.grad_fn).__name__
    assert torch.equal(y, again)
    leaves = [x, norm.weight, norm.bias]
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, dy)
    again.backward(dy)
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, gradients, strict=True))


each_backend = pytest.mark.parametrize("backend", ["fused", "lean"])


def trained(norm, run, x, backend="native"):
    """Output and gradients of `run(norm, x)` under autocast, by a backend."""
    x = x.detach().requires_grad_()
    with low_precision_layernorm("bf16", backend=backend), torch.autocast(DEVICE, dtype=BF16):
        y = run(norm, x)
    dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, [x, *norm.parameters()], dy)


def a_norm(features=64):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(features, device=DEVICE)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    torch.nn.init.normal_(norm.bias, 0.0, 0.2)
    return norm, torch.randn(5, features, device=DEVICE)


def assert_close(results, expected):
    for result, e in zip(results, expected, strict=True):
        assert result.dtype is e.dtype
        torch.testing.assert_close(result, e, rtol=1e-2, atol=1e-2)


@runs_kernels
@each_backend
def test_make_fx_traces_natives_operators(backend):
    """make_fx sees no kernel: its graph, of forward and backward too, computes native's values."""
    from torch.fx.experimental.proxy_tensor import make_fx

    norm, x = a_norm()

    def both(x, weight, bias):
        y = torch.nn.functional.layer_norm(x, (64,), weight, bias)
        return y, *torch.autograd.grad(y.float().pow(2).sum(), [x, weight, bias])

    leaves = [t.detach().requires_grad_() for t in (x, norm.weight, norm.bias)]
    with low_precision_layernorm("bf16", backend=backend), torch.autocast(DEVICE, dtype=BF16):
        graph = make_fx(both)(*leaves)
    with low_precision_layernorm("bf16", backend="native"), torch.autocast(DEVICE, dtype=BF16):
        expected = both(*leaves)
    assert "native_layer_norm_backward" in graph.code
    assert_close(graph(*leaves), expected)


@runs_kernels
@each_backend
@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_make_fx_traces_the_backward_of_a_kernel(backend, x_dtype):
    """Traced after a forward in the kernels, backward is in operators, and of the same values."""
    from torch.fx.experimental.proxy_tensor import make_fx

    norm, x = a_norm()
    x = x.to(x_dtype).requires_grad_()
    leaves = [x, *norm.parameters()]
    with low_precision_layernorm("bf16", backend=backend), torch.autocast(DEVICE, dtype=BF16):
        y = norm(x)
    assert "FusedNorm" in type(y.grad_fn).__name__
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    graph = make_fx(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(dy)
    assert_close(graph(dy), expected)


@runs_kernels
@each_backend
@pytest.mark.parametrize("saved", ["everything", "nothing"])
def test_selective_checkpointing(backend, saved):
    """Whatever its policy saves, values and gradients are those without checkpointing."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    norm, x = a_norm()
    decision = {"everything": "MUST_SAVE", "nothing": "MUST_RECOMPUTE"}[saved]
    policy = functools.partial(lambda decision, *_, **__: decision, CheckpointPolicy[decision])
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def run(norm, x):
        return checkpoint(norm, x, use_reentrant=False, context_fn=contexts).relu()

    expected = trained(norm, lambda norm, x: norm(x).relu(), x)
    assert_close(trained(norm, run, x, backend), expected)


@runs_kernels
@each_backend
def test_replicas_of_data_parallel(backend):
    """A replica's parameters are no leaves: gradients arrive at those of the module."""
    norm, x = a_norm()

    def run(norm, x):
        replicas = [norm._replicate_for_data_parallel() for _ in range(2)]
        for replica in replicas:  # as torch.nn.parallel.replicate does, which takes no CPU
            for name, parameter in norm.named_parameters():
                setattr(replica, name, parameter * 1)
        outputs = [replica(part) for replica, part in zip(replicas, x.split(3), strict=True)]
        assert all("FusedNorm" in type(y.grad_fn).__name__ for y in outputs)
        return torch.cat(outputs)

    expected = trained(norm, lambda norm, x: norm(x), x)
    assert_close(trained(norm, run, x, backend), expected)


@runs_kernels
@each_backend
@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_saved_tensors_may_be_kept_on_the_cpu_and_in_another_dtype(backend, x_dtype):
    """save_on_cpu, and hooks that pack in float32: the gradients without hooks."""
    norm, x = a_norm()
    x = x.to(x_dtype)
    expected = trained(norm, lambda norm, x: norm(x), x, backend)
    as_float = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.float() if t.is_floating_point() else t, lambda t: t
    )
    for hooks in (torch.autograd.graph.save_on_cpu(), as_float):

        def run(norm, x, hooks=hooks):
            with hooks:
                return norm(x)

        assert_close(trained(norm, run, x, backend), expected)


class BreaksTheGraph(torch.nn.Module):
    """Dynamo gives its forward up inside a loop, and looks at what that calls by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64, device=DEVICE)

    def forward(self, x):
        for _ in range(2):
            torch._dynamo.graph_break()
            x = self.norm(x)
        return x


@runs_kernels
def test_dynamo_compiles_none_of_it():
    """Compiled code takes its own way; behind a graph break the kernels run, and make no graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = BreaksTheGraph()
    x = torch.randn(5, 64, device=DEVICE, requires_grad=True)
    with low_precision_layernorm("bf16", backend="fused"), torch.autocast(DEVICE, dtype=BF16):
        y = torch.compile(model.norm, backend=backend, fullgraph=True)(x)
        assert "FusedNorm" not in str(y.grad_fn)
        assert len(graphs) == 1
        y = torch.compile(model, backend=backend)(x)
        assert "FusedNorm" in str(y.grad_fn)
        y.backward(torch.ones_like(y))
    assert len(graphs) == 1


def kernels_of(call):
    """The names of the kernels that `call` launches, when it has run before."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if "CUDA" in str(e.device_type)]


@needs_gpu
@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("features", [1024, 8192, 20000])
def test_one_kernel_forward_and_two_backward(x_dtype, features):
    """Nothing is launched but the kernels: no cast, no copy, no fill."""
    x, *rest = arguments((4096, features), x_dtype=x_dtype)
    y = fused.fused(x, *rest, 1e-5, BF16)
    dy = torch.randn_like(y)
    leaves = [x, *rest[1:]]
    looped = "_looped" if features > 8192 else ""
    forward = kernels_of(lambda: fused.fused(x, *rest, 1e-5, BF16))
    assert forward == [f"norm_forward{looped}"]
    backward = kernels_of(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
    assert backward == [f"norm_backward{looped}", "norm_reduce"]


@needs_gpu
@pytest.mark.parametrize(("rows", "features"), [(20000, 768), (4000, 8192), (4000, 17000)])
def test_every_program_goes_through_several_tiles(rows, features):
    """Gradients of weight and bias over more tiles than programs: right, and the same twice."""
    inputs = arguments((rows, features))
    dy, *results = run(*inputs)
    assert_right(inputs[0], BF16, results, exact(*inputs, dy))
    _, *again = run(*inputs, dy=dy)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@needs_gpu
def test_cuda_graph_and_other_stream():
    """Captured on a stream of its own and replayed on new values, forward and backward."""
    x, *rest = arguments((64, 1024))
    dy = torch.randn(64, 1024, device="cuda", dtype=BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x, *rest, dy=dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, *captured = run(x, *rest, dy=dy)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    _, *expected = run(x, *rest, dy=dy)
    assert all(torch.equal(c, e) for c, e in zip(captured, expected, strict=True))


@run_elsewhere(torch.cuda.device_count() < 2, "two CUDA GPUs")
def test_second_gpu():
    """A tensor on a device that is not the current one."""
    x, shape, w, b = (
        t.detach().to("cuda:1").requires_grad_() if isinstance(t, torch.Tensor) else t
        for t in arguments((64, 1024))
    )
    dy = torch.randn(64, 1024, device="cuda:1", dtype=BF16)
    _, *results = run(x, shape, w, b, dy=dy)
    assert_right(x, BF16, results, exact(x, shape, w, b, dy))


@needs_gpu
def test_more_elements_than_32_bits_count():
    """The last rows of more than 2**31 elements are as right as those of a small input."""
    rows, features = 2**21 + 5, 1024
    x = torch.randn(rows, features, device="cuda", dtype=BF16).requires_grad_()
    _, *rest = arguments((1, features))
    dy = torch.randn(rows, features, device="cuda", dtype=BF16)
    _, y, dx, *_ = run(x, *rest, dy=dy)
    last = x.detach()[-9:].clone().requires_grad_()
    _, last_y, last_dx, *_ = run(last, *rest, dy=dy[-9:])
    assert torch.equal(y[-9:], last_y)
    assert torch.equal(dx[-9:], last_dx)


@runs_kernels
def test_kernels_compile_for_a_gpu_that_is_not_here():
    """Triton compiles the tiles that are launched for compute capability 8.0 and 9.0.

    They need no more shared memory than smaller GPUs have.
    """
    printed = run_forked("-c", COMPILE).stdout
    assert (
        printed.split()
        == ["forward", "forward", "backward", "backward"] * 3
        + ["forward", "backward"]
        + ["reduce"] * 3
    )


# Arguments as Triton specialises them: what is None, and an integer that is 1, is a constant.
COMPILE = textwrap.dedent(
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from lpln_autopatch.backends.fused import backward_kernels, forward_kernels, grid
    from lpln_autopatch.backends.fused.launch import OPTIONS

    TYPES = dict(
        p_x="*fp32", p_weight="*fp32", p_bias="*fp32", p_y="*bf16", p_dy="*bf16", p_dx="*fp32",
        p_kept="*bf16", p_statistics="*fp32", p_partials="*fp32", p_dweight="*fp32",
        p_dbias="*fp32", p_slots="*i32", p_counts="*i32", p_next="*i32", p_reserved="*bf16",
        eps="fp32", smallest="fp32", rounding="fp32",
    )

    def compile(name, warps, **constants):
        module = backward_kernels if name[:2] in ("ba", "re") else forward_kernels
        kernel = getattr(module, f"norm_{name}")
        arguments = kernel.arg_names
        constants = {k: v for k, v in constants.items() if k in arguments}
        if name.startswith("backward"):
            for needed in ("p_statistics", "p_kept"):
                constants.pop(needed, None)
        signature = {a: "constexpr" if a in constants else TYPES.get(a, "i32") for a in arguments}
        unspecialised = "M", "programs"
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, a in enumerate(arguments)
            if a not in constants and TYPES.get(a, "M") != "fp32" and a not in unspecialised
        }
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
            signature = {a: kind for a, kind in signature.items() if kind != "constexpr"}
            aligned = None
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": warps, **OPTIONS}
        for capability in (80, 90):
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= 99 * 1024  # what a block has on a GeForce, too
        print(name.removesuffix("_looped"))

    contiguous = dict(x_inner=1, dy_inner=1)
    no_recovery = dict.fromkeys(("p_slots", "p_reserved", "p_counts", "p_next"))
    for n, centred, absent in (
        (1024, True, {}),
        (8192, False, dict(p_bias=None, p_statistics=None, p_dx=None, p_kept=None)),
        (8208, True, {}),
        (65536, False, dict(p_weight=None, p_partials=None, p_kept=None)),
    ):
        tiles = dict(forward=grid.LOOPED_FORWARD, backward=grid.LOOPED_BACKWARD)
        for name in tiles:
            tile = grid.tile(n, tiles[name])
            constants = dict(ROWS=tile.rows, BLOCK=tile.block, CENTRED=centred)
            for recovery in ({}, no_recovery)["p_weight" in absent :]:
                is_x = bool(recovery) and "p_kept" in absent
                constants.update(IS_X=is_x, WITH_MEAN=is_x and centred)
                constants["STAGES"] = grid.stages(tile, not recovery)
                name_of = name + "_looped" * tile.looped
                compile(name_of, tile.warps, **constants, **contiguous, **absent, **recovery)
    for absent in ({}, dict(p_dweight=None), dict(p_dbias=None)):
        compile("reduce", 4, **dict(zip(("ROWS", "BLOCK"), grid.REDUCED)), **absent)
    """
)


@runs_kernels
def test_kernels_compile_for_a_gpu_and_are_launched_as_triton_launches_them():
    """A launch without Triton's look at the arguments: its kernel, and its launcher's arguments.

    With Triton's own classes and kernels compiled for compute capability 9.0; only the launcher
    that it makes for a GPU is replaced, by one that notes what it gets.
    """
    printed = run_forked("-c", LAUNCH, timeout=600).stdout
    assert printed == "same\n"


LAUNCH = textwrap.dedent(
    """
    import torch
    import triton
    from triton.runtime.jit import JITFunction
    from lpln_autopatch.backends.fused import fused, lean
    from lpln_autopatch.backends.fused.launch import OPTIONS, Launch
    from lpln_autopatch.bench import host

    driver = host.pretend()
    launch, triton_runs, launches = Launch.__call__, [], 0
    run = JITFunction.run
    JITFunction.run = lambda *args, **kwargs: triton_runs.append(1) or run(*args, **kwargs)

    def plain(argument):
        if type(argument).__name__ == "HookChain" and not argument.calls:
            return None  # a launcher does nothing for both
        return argument.get() if type(argument).__name__ == "LazyDict" else argument

    def check(self, given, allocated):
        global launches
        driver.launched = []
        arguments = *given, *allocated, *self._after_tensors
        self._kernel[self._grid](*arguments, num_warps=self._warps, **OPTIONS)
        launch(self, given, allocated)
        triton_runs.clear()
        launch(self, given, allocated)
        tensors = given + allocated
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
        assert bool(triton_runs) != aligned
        (metadata, expected), *others = driver.launched
        assert len(others) == 2
        for own, got in others:
            assert own is metadata, "another kernel"
            assert len(got) == len(expected)
            got, expected_now = list(map(plain, got)), list(map(plain, expected))
            if expected_now[7:9] == [None, None]:  # without hooks nobody reads their metadata
                got[6] = expected_now[6] = None
            for g, e in zip(got, expected_now):
                assert g is e or (type(g) is type(e) and g == e), (g, e)
        launches += 1

    Launch.__call__ = check

    def call(backend, x, n_dims=1, weight=True, bias=True, dtype=torch.bfloat16, parameters=None):
        features = x.shape[-n_dims:]
        w, b = (torch.ones(features, dtype=parameters, requires_grad=True) for _ in range(2))
        w, b = torch.nn.Parameter(w) if weight else None, b if bias else None
        x = x.detach().requires_grad_()
        y = backend(x, features, w, b, 1e-5, dtype)
        y.backward(torch.ones_like(y))
        with torch.no_grad():
            backend(x, features, w, b, 0, dtype)

    bf16, fp16 = torch.bfloat16, torch.float16
    for backend in (fused, lean):
        for rows in (1, 8, 17):
            call(backend, torch.ones(rows, 64))
        call(backend, torch.ones(8, 64, dtype=bf16))
        call(backend, torch.ones(8, 64, dtype=fp16), parameters=bf16, dtype=fp16)
        call(backend, torch.ones(8, 100))
        call(backend, torch.ones(8, 1))
        call(backend, torch.ones(8, 64), bias=False)
        call(backend, torch.ones(8, 64), weight=False, bias=False)
        call(backend, torch.ones(3, 5, 64).transpose(0, 1))
        call(backend, torch.ones(3, 5, 100).transpose(0, 1))
        call(backend, torch.ones(9, 64)[:, None].expand(9, 2, 64)[::2])
        call(backend, torch.ones(8 * 64 + 1)[1:].view(8, 64))  # 16 does not divide its address
        call(backend, torch.ones(8, 64))  # and again one that it does
    call(fused, torch.ones(2, 8208))
    # What a profiler gets.
    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook) if runtime else ():
        hook.add(print)
        call(lean, torch.ones(8, 64))
        hook.remove(print)
    if runtime and hasattr(runtime, "launch_enter_hook"):
        chain, heard = runtime.launch_enter_hook, []
        runtime.launch_enter_hook = heard.append  # a function in place of the chain
        call(fused, torch.ones(8, 64))
        call(fused, torch.ones(8, 64))
        runtime.launch_enter_hook = chain
    # Rows that 32 bits do not count, which no kernel reads here, behind some that they do.
    x, y = torch.ones(8, 64), torch.ones(8, 64, dtype=bf16)
    from lpln_autopatch.backends.fused import forward_kernels
    for rows in (8, 2**31 - 1, 2**31, 8):
        numbers = rows, 64, 1e-5, 1e-38, 1, 64, 0
        launched = Launch(
            forward_kernels.norm_forward, (1, 1, 1), -1, numbers, (True, False, 8, 64), 1
        )
        launched((x, None, None), (y, *[None] * 6))
    assert launches > 100
    print("same")
    """
)


def test_missing_triton_is_named():
    """Without Triton: an ImportError that names it and the command that installs it."""
    code = """
        import sys
        sys.modules["triton"] = None
        import lpln_autopatch
        try:
            lpln_autopatch.enable(backend="fused")
        except ImportError as error:
            print(error)
        print(lpln_autopatch.status().precision)
    """
    lines = run_forked("-c", textwrap.dedent(code)).stdout.splitlines()
    assert ("pip install triton" in lines[0]) == (TORCH_VERSION >= (2, 6))
    assert lines[-1] == ("None" if TORCH_VERSION >= (2, 6) else "amp")


@pytest.mark.parametrize("backend", [fused.fused, fused.lean])
@pytest.mark.parametrize("where", ["torch 2.5", "no interpreter"])
def test_where_the_kernels_do_not_run_it_is_native_and_says_so_once(
    backend, where, monkeypatch, caplog
):
    """Before torch 2.6, and on the CPU: native's values, one line in the log, and the doctor's."""
    if where == "torch 2.5":
        monkeypatch.setattr(fused, "HAS_TRITON_KERNELS", False)
    elif TORCH_VERSION >= (2, 6):
        monkeypatch.setattr(fused._triton(), "takes_cpu", lambda: False)
    fused._say_once.cache_clear()
    case = torch.randn(4, 8), (8,), torch.ones(8), None, 1e-5, BF16
    with caplog.at_level("INFO", logger="lpln_autopatch"):
        for _ in range(2):
            assert torch.equal(fused.load(backend)(*case), native.normalise(*case))
    (line,) = caplog.messages
    assert "its kernels do not run on " in line
    if where == "torch 2.5" or not CUDA:
        assert fused.why_native().startswith("native: ")


def test_triton_is_imported_by_nobody_else():
    """Only fused and lean import Triton."""
    code = "import lpln_autopatch as l, sys; l.enable(); print('triton.language' in sys.modules)"
    assert run_forked("-c", code).stdout.split()[-1] == "False"
