"""The CPU's way for a large low-precision x. Most tests have it take small ones too."""

from __future__ import annotations

import pytest
import torch
from support import AUTOCAST_DTYPES, autocast

from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import CPU_TAKES_MIXED_DTYPES
from lpln_autopatch.backends import cpu, native

pytestmark = pytest.mark.skipif(
    not CPU_TAKES_MIXED_DTYPES, reason="the mixed kernel is in torch >= 2.2; CI has later ones"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPE = (3, 5, 4, 6)

parameters = pytest.mark.parametrize("which", ["both", "neither", "weight", "bias"])


@pytest.fixture
def takes_all(monkeypatch) -> None:
    """Every x is large, and every gradient is summed up over several blocks of rows."""
    monkeypatch.setattr(cpu, "SMALLEST", 1)
    monkeypatch.setattr(cpu, "_BLOCK", 100)


def arguments(which: str = "both", dtype: torch.dtype = BF16, parameter_dtype=FP32):
    """x of four dimensions, the last two normalised, weight, bias and eps."""
    torch.manual_seed(0)
    x = (torch.randn(SHAPE) * 3 + 2).to(dtype).requires_grad_()
    weight, bias = ((torch.randn(4, 6) + 1).to(parameter_dtype).requires_grad_() for _ in "wb")
    return (
        x,
        (4, 6),
        weight if which in ("both", "weight") else None,
        bias if which in ("both", "bias") else None,
        1e-5,
    )


def run(call, upstream, function=native.normalise, **options):
    """The output and the gradients of all that wants one."""
    y = function(*call, upstream.dtype)
    wanted = [t for t in (call[0], *call[2:4]) if t is not None and t.requires_grad]
    return y, torch.autograd.grad(y, wanted, upstream, **options)


def in_float64(call, upstream, **options):
    """The same, exactly."""
    exact = [t.detach().double().requires_grad_() if torch.is_tensor(t) else t for t in call]
    return run(exact, upstream.double(), lambda *a: torch.layer_norm(*a[:-1]), **options)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@parameters
@pytest.mark.parametrize("dtype", AUTOCAST_DTYPES)
@pytest.mark.parametrize("parameters_too", [False, True])
def test_output_is_rounded_once_and_sums_are_in_float32(takes_all, which, dtype, parameters_too):
    """Gradients of float32 parameters are right to float32, the rest is rounded once."""
    call = arguments(which, dtype, dtype if parameters_too else FP32)
    assert cpu.takes(*call[:4], dtype)
    upstream = torch.randn(SHAPE).to(dtype)
    y, gradients = run(call, upstream)
    exact, exact_gradients = in_float64(call, upstream)
    rounding = torch.finfo(dtype).eps
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    assert error(y, exact) < rounding / 2
    tensors = [t for t in (call[0], *call[2:4]) if t is not None]
    for got, right, of in zip(gradients, exact_gradients, tensors, strict=True):
        assert (got.dtype, got.shape) == (of.dtype, of.shape)
        assert error(got, right) < (1e-6 if of.dtype is FP32 else rounding / 2)


def test_values_are_those_without_gradients(takes_all):
    """no_grad, inference mode and frozen tensors change no bit."""
    call = arguments()
    y = native.normalise(*call, BF16)
    for block in (torch.no_grad(), torch.inference_mode()):
        with block:
            assert torch.equal(native.normalise(*call, BF16), y)
    frozen = [t.detach() if torch.is_tensor(t) else t for t in call]
    assert torch.equal(native.normalise(*frozen, BF16), y)
    assert y.requires_grad


@pytest.mark.parametrize("wanted", [(0,), (2,), (3,), (2, 3), (0, 3)])
def test_only_what_is_wanted_gets_a_gradient(takes_all, wanted):
    """x, weight and bias in any combination, with the gradients of all of them."""
    call, upstream = arguments(), torch.randn(SHAPE).to(BF16)
    expected = dict(zip((0, 2, 3), run(call, upstream)[1], strict=True))
    some = [
        t.detach().requires_grad_(i in wanted) if torch.is_tensor(t) else t
        for i, t in enumerate(call)
    ]
    _, gradients = run(some, upstream)
    for i, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, expected[i])


@pytest.mark.parametrize(
    "layout", ["transposed", "expanded upstream", "every second row", "transposed weight"]
)
def test_any_strides(takes_all, layout):
    """Non-contiguous x, weight and upstream give what contiguous ones give."""
    call, upstream = arguments(), torch.randn(SHAPE).to(BF16)
    weight = call[2]
    x = call[0].detach()
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second row":
        x = torch.stack([x, x], 2)[:, :, 1]
    if layout == "expanded upstream":
        upstream = torch.ones((), dtype=BF16).expand(SHAPE)
    if layout == "transposed weight":
        weight = weight.detach().t().contiguous().t().requires_grad_()
    y, gradients = run((x.requires_grad_(), call[1], weight, *call[3:]), upstream)
    expected, expected_gradients = run(call, upstream.contiguous())
    assert torch.equal(y, expected)
    for got, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, right)


@parameters
def test_second_derivatives(takes_all, which):
    """Those of float64, to the precision of the output."""
    call, upstream = arguments(which), torch.randn(SHAPE).to(BF16)

    def second(of, first):
        total = sum(g.double().pow(3).sum() for g in first)
        wanted = [t for t in (of[0], of[2]) if t is not None and t.requires_grad]
        return torch.autograd.grad(total, wanted)

    got = second(call, run(call, upstream, create_graph=True)[1])
    exact = [t.detach().double().requires_grad_() if torch.is_tensor(t) else t for t in call]
    if which == "bias":  # PyTorch's own fails without a weight (torch 2.13, 2.15)
        exact[2] = torch.ones(4, 6).double()
    _, first = run(
        exact, upstream.double(), lambda *a: torch.layer_norm(*a[:-1]), create_graph=True
    )
    for g, e in zip(got, second(exact, first), strict=True):
        assert error(g, e) < 0.02


def test_gradients_of_many_upstreams_at_once(takes_all):
    """is_grads_batched maps over backward: the gradients of a loop."""
    call, upstreams = arguments(), torch.randn(3, *SHAPE).to(BF16)
    y = native.normalise(*call, BF16)
    wanted = [call[0], *call[2:4]]
    got = torch.autograd.grad(y, wanted, upstreams, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(y, wanted, u, retain_graph=True) for u in upstreams]
    for batched, *single in zip(got, *loop, strict=True):
        torch.testing.assert_close(batched, torch.stack(single))


def test_what_it_has_no_formula_for_takes_the_other_way(takes_all):
    """torch.func, forward mode, the other low precision, an inference tensor to train on."""
    call = arguments()
    x, shape, weight, bias, eps = [t.detach() if torch.is_tensor(t) else t for t in call]

    def normalise(x):
        return native.normalise(x, shape, weight, bias, eps, BF16)

    y, tangent = torch.func.jvp(normalise, (x,), (x,))
    assert y.dtype is tangent.dtype is BF16
    mapped = torch.func.vmap(torch.func.grad(lambda x: normalise(x).float().pow(3).sum()))(x)
    assert (mapped.dtype, mapped.shape) == (BF16, x.shape)
    assert not cpu.takes(x, shape, weight, bias, FP16)
    assert not cpu.takes(x.float(), shape, weight, bias, BF16)
    with torch.inference_mode():
        inference = x.clone()
    y = native.normalise(inference, *call[1:], BF16)
    assert torch.autograd.grad(y.sum(), call[2])[0].dtype is FP32


def test_what_is_kept_is_x(takes_all):
    """In its own dtype, with two float32 numbers a row and the weight."""
    call, kept = arguments(), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
    ):
        native.normalise(*call, BF16)
    assert sum(kept.values()) == call[0].nbytes + call[2].nbytes + 2 * 3 * 5 * 4


@pytest.mark.parametrize("give_back", [lambda t: t.float(), lambda t: t.clone()])
def test_hooks_on_saved_tensors(takes_all, give_back):
    """What they give back is used, in another dtype too."""
    call, upstream = arguments(), torch.randn(SHAPE).to(BF16)
    _, expected = run(call, upstream)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, give_back):
        _, got = run(call, upstream)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.to(e.dtype), e)


def test_a_mode_around_backward_alone_changes_nothing(takes_all):
    """Checkpointing recomputes under a FlopCounterMode what forward kept without one."""
    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    call, upstream = arguments(), torch.randn(SHAPE).to(BF16)
    _, expected = run(call, upstream)
    y = checkpoint(lambda x: native.normalise(x, *call[1:], BF16), call[0], use_reentrant=False)
    with FlopCounterMode(display=False):
        got = torch.autograd.grad(y, [call[0], *call[2:4]], upstream)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def test_normalized_shape_may_change_before_backward(takes_all):
    """A list that the caller changes between forward and backward changes no gradient."""
    call, upstream = arguments(), torch.randn(SHAPE).to(BF16)
    _, expected = run(call, upstream)
    shape = list(call[1])
    y = native.normalise(call[0], shape, *call[2:], BF16)
    shape.reverse()
    got = torch.autograd.grad(y, [call[0], *call[2:4]], upstream)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def test_wrong_shapes_get_pytorchs_own_error(takes_all):
    """As stock words it."""
    x, _, weight, bias, eps = arguments()
    for shape in ((6, 4), ()):
        with pytest.raises(RuntimeError) as stock:
            torch.layer_norm(x, shape, weight, bias, eps)
        with pytest.raises(RuntimeError) as ours:
            native.normalise(x, shape, weight, bias, eps, BF16)
        assert str(ours.value).splitlines()[0] == str(stock.value).splitlines()[0]


@pytest.mark.parametrize("create_graph", [False, True])
def test_large_inputs_take_this_way(create_graph):
    """A LayerNorm in a program: an x above the limit is kept as it is, one below is upcast."""
    norm = torch.nn.LayerNorm(1024)
    for rows, dtype in ((256, BF16), (255, FP32)):
        x = torch.randn(rows, 1024).to(BF16).requires_grad_()
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append((t.shape, t.dtype)) or t, lambda t: t
        )
        with low_precision_layernorm(), autocast(), hooks:
            y = norm(x)
        assert (x.shape, dtype) in kept
        upstream = torch.randn(x.shape).to(BF16)
        gradients = torch.autograd.grad(
            y, [x, norm.weight, norm.bias], upstream, create_graph=create_graph
        )
        exact = in_float64((x, (1024,), norm.weight, norm.bias, 1e-5), upstream)[1]
        for got, right, limit in zip(gradients, exact, (0.004, 1e-6, 1e-6), strict=True):
            assert error(got, right) < limit


@pytest.mark.parametrize("rows", [1, 255])
def test_without_gradients_a_small_input_takes_this_way_too(rows):
    """Nothing is kept and nothing summed up then: one kernel, and no upcast."""
    from torch.utils._python_dispatch import TorchDispatchMode

    ran = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(function._overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    norm, x = torch.nn.LayerNorm(1024), torch.randn(rows, 1024).to(BF16)
    with low_precision_layernorm(), autocast(), torch.no_grad(), Mode():
        y = norm(x)
    assert ran == ["native_layer_norm"]
    exact = torch.layer_norm(x.double(), (1024,), norm.weight.double(), norm.bias.double())
    assert error(y.detach(), exact.detach()) < torch.finfo(BF16).eps / 2
