from __future__ import annotations

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from support import AUTOCAST_DTYPES, autocast, output_dtype
from torch import fx

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import HAS_RMS_NORM, TORCH_VERSION

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

needs_torch_func = pytest.mark.skipif(
    not hasattr(torch, "func"), reason="torch.func is in torch >= 2.0; CI runs this there"
)


@pytest.fixture
def lowered():
    """Low precision, whatever autocast runs in."""
    with low_precision_layernorm("amp"):
        yield


@pytest.mark.parametrize("dtype", AUTOCAST_DTYPES)
@pytest.mark.parametrize("input_dtype", [FP32, BF16, FP16])
def test_lowered_output_is_the_float32_one_rounded_once(layer_norm, lowered, dtype, input_dtype):
    """y = round(LayerNorm in float32): for every input dtype, to the autocast dtype."""
    x = torch.randn(64, 8).to(input_dtype)
    exact = F.layer_norm(x.float(), (8,), layer_norm.weight, layer_norm.bias)
    with autocast(dtype):
        y = layer_norm(x)
    assert y.dtype is dtype
    # Two float32 kernels may differ in their last bit, and so fall on either side of a tie.
    torch.testing.assert_close(y, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert (y == exact.to(dtype)).float().mean() > 0.98


def test_gradients_keep_their_dtypes(layer_norm, lowered):
    """The gradient of x has x's dtype, those of the parameters have theirs."""
    for input_dtype in (FP32, BF16):
        x = torch.randn(4, 8, dtype=input_dtype, requires_grad=True)
        with autocast():
            y = layer_norm(x)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, *layer_norm.parameters()])
        assert [g.dtype for g in gradients] == [input_dtype, FP32, FP32]


def test_float32_input_is_what_is_saved_for_backward(layer_norm, lowered):
    """No rounded copy of x is kept: backward saves the caller's own tensor."""
    x = torch.randn(4, 8, requires_grad=True)
    saved: list[torch.Tensor] = []
    with (
        autocast(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        layer_norm(x)
    assert {t.data_ptr() for t in saved if t.shape == x.shape} == {x.data_ptr()}


@pytest.mark.parametrize(
    "stock_call",
    [
        pytest.param(lambda m, x: m(x), id="no autocast"),
        pytest.param(lambda m, x: in_autocast(m, x, enabled=False), id="autocast disabled inside"),
        pytest.param(lambda m, x: in_autocast(m.double(), x.double()), id="float64"),
        pytest.param(lambda m, x: in_autocast(lpln.exempt(m), x), id="exempt"),
    ],
)
def test_stock_calls_are_stock_bit_for_bit(layer_norm, stock_call):
    """A call that fails a condition for lowering has PyTorch's own output and gradients."""

    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(4, 8, requires_grad=True)
        y = stock_call(layer_norm, x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer_norm.parameters()])]

    expected = run()
    with low_precision_layernorm():
        got = run()
    for e, g in zip(expected, got, strict=True):
        assert e.dtype is g.dtype
        assert torch.equal(e, g)


def in_autocast(module, x, enabled=True):
    with autocast(), autocast(enabled=enabled):
        return module(x)


def test_integer_input_gets_pytorchs_error(layer_norm, lowered):
    """An integer input fails as it does in PyTorch, with PyTorch's message."""
    x = torch.ones(4, 8, dtype=torch.long)
    with pytest.raises(RuntimeError) as stock:
        F.layer_norm(x, (8,), layer_norm.weight, layer_norm.bias)
    with autocast(), pytest.raises(RuntimeError) as ours:
        layer_norm(x)
    assert str(ours.value) == str(stock.value)


def norm_calls(x_dtype=FP32, weight_dtype=FP32, bias_dtype=FP32):
    """Each norm that has a bias, as a function that calls it for tensors of these dtypes."""
    x, weight, bias = torch.ones(4, 8).to(x_dtype), *torch.ones(2, 8)
    parameters = weight.to(weight_dtype), bias.to(bias_dtype)
    return [lambda: F.layer_norm(x, (8,), *parameters), lambda: F.group_norm(x, 2, *parameters)]


REFUSED = [
    getattr(torch, name)
    for name in ("int64", "bool", "complex64", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)  # float8 is in torch >= 2.1
]


@pytest.mark.parametrize("dtype", REFUSED)
@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_parameters_that_stock_refuses_get_pytorchs_error(input_dtype, dtype):
    """An integer, complex or float8 weight or bias is as much of an error as in stock."""
    for call in norm_calls(input_dtype, weight_dtype=dtype):
        with autocast(), pytest.raises(RuntimeError) as stock:
            call()
        with low_precision_layernorm(norms="all"), autocast(), pytest.raises(RuntimeError) as ours:
            call()
        assert str(ours.value) == str(stock.value)
    for call in norm_calls(input_dtype, bias_dtype=dtype):
        with autocast(), pytest.raises(RuntimeError):
            call()
        with (
            low_precision_layernorm(norms="all"),
            autocast(),
            # x is float32 by then, so stock's words may name other dtypes.
            pytest.raises(RuntimeError, match=r"mixed dtype|expected scalar type"),
        ):
            call()


@pytest.mark.parametrize("dtype", REFUSED[3:])
def test_float8_input_gets_pytorchs_error(dtype):
    """PyTorch's norms take no float8 on CPU, and autocast there does not cast it."""
    x = torch.ones(4, 8).to(dtype)
    calls = norm_calls(dtype)
    if HAS_RMS_NORM:
        calls.append(lambda: F.rms_norm(x, (8,)))
    for call in calls:
        with autocast(), pytest.raises(RuntimeError) as stock:
            call()
        with low_precision_layernorm(norms="all"), autocast(), pytest.raises(RuntimeError) as ours:
            call()
        assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_float64_parameters_get_pytorchs_error(layer_norm, lowered, input_dtype):
    """PyTorch refuses float64 parameters with another x, and so do we."""
    with autocast(), pytest.raises(RuntimeError, match=r"mixed dtype|expected scalar type"):
        layer_norm.double()(torch.randn(4, 8).to(input_dtype))


def test_wrong_shape_gets_pytorchs_error(layer_norm, lowered):
    """Trailing dimensions that differ from normalized_shape: PyTorch's own message."""
    with autocast(), pytest.raises(RuntimeError, match=r"Given normalized_shape=\[8\]"):
        layer_norm(torch.randn(4, 7))


def test_meta_tensors_are_stock(lowered):
    """autocast does not know meta: the call is stock and does not raise."""
    module = torch.nn.LayerNorm(8, device="meta")
    assert output_dtype(module, torch.empty(4, 8, device="meta")) is FP32


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.LayerNorm(8), (0, 8)),
        (torch.nn.LayerNorm(8), (8,)),
        (torch.nn.LayerNorm(8), (2, 3, 4, 8)),
        (torch.nn.LayerNorm((3, 8)), (2, 3, 8)),
        (torch.nn.LayerNorm(()), (2, 8)),
        (torch.nn.LayerNorm(8, elementwise_affine=False), (4, 8)),
        (torch.nn.LayerNorm(1), (4, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_shapes_are_pytorchs(lowered, module, shape, input_dtype):
    """Zero rows, no rows, several dimensions, no parameters: the shape and values of PyTorch."""
    if shape == (2, 8) and module.normalized_shape == ():
        with autocast(), pytest.raises(RuntimeError, match="normalized_shape to be at least 1"):
            module(torch.randn(shape))
        return
    x = torch.randn(shape).to(input_dtype)
    with autocast():
        y = module(x)
    assert y.dtype is BF16
    expected = F.layer_norm(x.float(), module.normalized_shape, module.weight, module.bias)
    # The CPU kernel for bfloat16 computes x * rstd - mean * rstd: of one value, not quite zero.
    torch.testing.assert_close(y, expected.to(BF16), rtol=BF16_EPS, atol=1e-4)


BF16_EPS = torch.finfo(BF16).eps


@pytest.mark.skipif(TORCH_VERSION < (2, 1), reason="LayerNorm(bias=) is in torch >= 2.1")
def test_bias_false(lowered):
    """A LayerNorm without bias is lowered; its weight has a gradient."""
    module = torch.nn.LayerNorm(8, bias=False)
    with autocast():
        y = module(torch.randn(4, 8))
    assert y.dtype is BF16
    y.float().square().sum().backward()
    assert module.weight.grad.dtype is FP32


@pytest.mark.parametrize("input_dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: x.expand(3, *x.shape),
        lambda x: x.flip(0)[1:, :],
        lambda x: x.repeat(1, 2)[:, ::2].contiguous()[:, :8],
    ],
)
def test_layout_does_not_change_values(layer_norm, lowered, layout, input_dtype):
    """Any strides: the values that the contiguous input has."""
    x = layout(torch.randn(6, 8).to(input_dtype))
    with autocast():
        torch.testing.assert_close(layer_norm(x), layer_norm(x.contiguous()), rtol=0, atol=0)


def test_low_precision_parameters(lowered):
    """A module in bfloat16 takes bfloat16, and float16 autocast does not break it."""
    module = torch.nn.LayerNorm(8).to(BF16)
    x = torch.randn(4, 8, dtype=BF16)
    for dtype in AUTOCAST_DTYPES:
        assert output_dtype(module, x, dtype) is dtype


def test_large_values_do_not_overflow(lowered):
    """A value beyond float16's range is normalised, not turned into inf."""
    x = torch.tensor([[1e5, -1e5, 3e4, 2.0]])
    module = torch.nn.LayerNorm(4)
    for dtype in AUTOCAST_DTYPES:
        for given in (x, x.to(BF16)):
            with autocast(dtype):
                y = module(given)
            torch.testing.assert_close(y.float(), module(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", AUTOCAST_DTYPES)
def test_parameter_gradients_are_summed_in_float32(layer_norm, lowered, dtype):
    """A low-precision x does not cost the gradients of weight and bias their precision."""
    x, upstream = torch.randn(2, 4096, 8).to(dtype)
    with autocast(dtype):
        y = layer_norm(x)
    got = torch.autograd.grad(y, list(layer_norm.parameters()), upstream)
    double = layer_norm.double()
    exact = torch.autograd.grad(double(x.double()), list(double.parameters()), upstream.double())
    for g, e in zip(got, exact, strict=True):
        assert relative(g.double(), e) < 1e-5


@pytest.mark.parametrize("dtype", AUTOCAST_DTYPES)
def test_inference_has_the_values_of_training(layer_norm, lowered, dtype):
    """The CPU's own low-precision kernel runs without gradients; its output is as close."""
    x = torch.randn(64, 8).to(dtype)
    with autocast(dtype):
        y = layer_norm(x)
        with torch.no_grad():
            torch.testing.assert_close(layer_norm(x), y, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_subclass_that_calls_super_is_lowered(layer_norm, lowered):
    """A subclass that runs LayerNorm's forward is lowered, with or without its own around it."""

    class Inherits(torch.nn.LayerNorm):
        pass

    class CallsSuper(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x + 1)

    assert output_dtype(Inherits(8)) is BF16
    assert output_dtype(CallsSuper(8)) is BF16


def test_forward_of_its_own_is_lowered_where_it_calls_the_function(lowered):
    """A subclass that calls F.layer_norm is lowered; a forward that calls no norm is not."""

    class Overrides(torch.nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    assert output_dtype(Overrides(8)) is BF16
    instance = torch.nn.LayerNorm(8)
    instance.forward = lambda x: x
    assert output_dtype(instance) is FP32


def test_input_by_keyword_and_hooks(layer_norm, lowered):
    """forward(input=x) works, and hooks see the lowered output."""
    seen: list[torch.dtype] = []
    layer_norm.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with autocast():
        assert layer_norm(input=torch.randn(4, 8)).dtype is BF16
    assert seen == [BF16]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_gets_the_stock_forward(layer_norm):
    """torch.jit.script and torch.jit.trace compile the stock forward while lowering is active."""
    x = torch.randn(4, 8)
    with low_precision_layernorm():
        scripted = torch.jit.script(layer_norm)
        with autocast():
            # check_trace runs the module again outside of tracing, where it is lowered.
            traced = torch.jit.trace(layer_norm, x, check_trace=False)
    for function in (scripted, traced):
        assert function(x).dtype is FP32
        assert torch.equal(function(x), layer_norm(x))


def test_trace_in_an_inner_block_passes_its_own_check(layer_norm, lowered):
    """The way that the docs give: trace inside an fp32 block, and no TracerWarning comes."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        with low_precision_layernorm("fp32"), autocast():
            torch.jit.trace(layer_norm, torch.randn(4, 8))


def test_fx_traces_the_stock_forward(layer_norm, lowered):
    """An fx.Proxy gets the stock forward; a traced model is lowered when it runs."""

    class Root(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x)

    graph = fx.symbolic_trace(Root(8))
    assert F.layer_norm in {node.target for node in graph.graph.nodes}
    leaf = fx.symbolic_trace(torch.nn.Sequential(layer_norm))
    assert output_dtype(leaf) is BF16


def gradcheck_inputs(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    return (torch.randn(4, 8, requires_grad=True), *module.parameters())


@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_double_backward(layer_norm, lowered, input_dtype):
    """Second derivatives are those of float32, to the precision of the output."""

    def second(x: torch.Tensor, context) -> torch.Tensor:
        with context:
            y = layer_norm(x)
        (first,) = torch.autograd.grad(y.float().pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.float().square().sum(), x)[0].float()

    x = torch.randn(4, 8).to(input_dtype).requires_grad_()
    exact = second(x.detach().double().float().requires_grad_(), contextlib.nullcontext())
    assert relative(second(x, autocast()), exact) < 0.05


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_forward_mode(layer_norm, lowered, input_dtype):
    """Primal and tangent have one dtype, the autocast dtype, and the right values."""
    if TORCH_VERSION < (2, 0) and input_dtype is BF16:
        pytest.skip("torch 1.13's LayerNorm has no forward-mode formula for it")
    x, t = torch.randn(2, 4, 8).to(input_dtype)
    weight_tangent = torch.randn(8)
    with fw.dual_level():
        exact = fw.unpack_dual(
            F.layer_norm(
                fw.make_dual(x.double(), t.double()),
                (8,),
                fw.make_dual(layer_norm.weight.double(), weight_tangent.double()),
                layer_norm.bias.double(),
            )
        )
        weight = fw.make_dual(layer_norm.weight.detach(), weight_tangent)
        del layer_norm.weight
        layer_norm.weight = weight
        with autocast():
            got = fw.unpack_dual(layer_norm(fw.make_dual(x, t)))
    assert got.primal.dtype is got.tangent.dtype is BF16
    assert relative(got.primal.double(), exact.primal) < 0.01
    assert relative(got.tangent.double(), exact.tangent) < 0.01


@needs_torch_func
@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_functorch_transforms(layer_norm, lowered, input_dtype):
    """vmap, grad, jvp, vjp and per-sample gradients run lowered, with the values of a loop."""
    from torch.func import functional_call, grad, jvp, vjp, vmap

    x = torch.randn(5, 4, 8).to(input_dtype)
    parameters = {k: v.detach() for k, v in layer_norm.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer_norm, parameters, (x,)).float().square().sum()

    with autocast():
        assert torch.equal(vmap(layer_norm)(x), torch.stack([layer_norm(s) for s in x]))
        per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        for i, sample in enumerate(x):
            one = grad(loss)(parameters, sample)
            for name in parameters:
                assert per_sample[name].dtype is FP32
                torch.testing.assert_close(per_sample[name][i], one[name], rtol=1e-4, atol=1e-4)
        y, tangent = jvp(layer_norm, (x,), (torch.ones_like(x),))
        assert y.dtype is tangent.dtype is BF16
        y, pull = vjp(layer_norm, x)
        assert pull(torch.ones_like(y))[0].dtype is input_dtype


@pytest.mark.skipif(TORCH_VERSION < (2, 4), reason="the FakeTensor of older versions lacks ops")
def test_fake_tensors_have_the_lowered_dtype(layer_norm, lowered):
    """Shape propagation sees what the real run gives."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, autocast():
        y = layer_norm(mode.from_tensor(torch.randn(4, 8)))
    assert (y.dtype, y.shape) == (BF16, (4, 8))


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="make_fx of torch 1.13 lacks autocast's ops")
def test_make_fx_traces_the_lowered_call(layer_norm, lowered):
    """make_fx records the norm and the rounding."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(4, 8)
    with autocast():
        graph = make_fx(layer_norm)(x)
        expected = layer_norm(x)
    assert torch.equal(graph(x), expected)
    assert expected.dtype is BF16


def test_warning_names_the_line_of_the_program(layer_norm):
    """The warning that a precision does not engage points at the call, outside of torch and us."""
    lpln.enable("amp_fp16")
    with autocast(torch.bfloat16), pytest.warns(lpln.NoEffectWarning) as caught:
        layer_norm(torch.randn(4, 8))
    assert [warning.filename for warning in caught] == [__file__]
