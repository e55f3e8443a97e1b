"""The functions of torch.nn.functional: who calls them is lowered, however they are called."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import re
import threading
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import wrapt
from support import AUTOCAST_DTYPES, autocast, needs_dynamo, output_dtype

import lpln_autopatch as lpln
from lpln_autopatch import _norms, low_precision_layernorm
from lpln_autopatch._torch_compat import HAS_RMS_NORM, TORCH_VERSION

BF16, FP32 = torch.bfloat16, torch.float32
nn = torch.nn

needs_rms_norm = pytest.mark.skipif(
    not HAS_RMS_NORM, reason="torch has rms_norm from 2.4 on; CI runs this there"
)


class Functional(nn.Module):
    """A LayerNorm of its own, in no way related to torch's, as nanoGPT and timm have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, 8))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


@pytest.fixture
def functional():
    return Functional()


@pytest.fixture
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


SPELLINGS = {
    "positional": lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-3),
    "keywords": lambda x, w, b: F.layer_norm(
        input=x, normalized_shape=(8,), weight=w, bias=b, eps=1e-3
    ),
    "list": lambda x, w, b: F.layer_norm(x, [8], w, b, eps=1e-3),
    "size": lambda x, w, b: F.layer_norm(x, w.shape, bias=b, weight=w, eps=1e-3),
    "defaults": lambda x, w, b: F.layer_norm(x, (8,)),
    "through torch": lambda x, w, b: torch.nn.functional.layer_norm(x, (8,), w, b),
}


@pytest.mark.parametrize("dtype", AUTOCAST_DTYPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_call_is_lowered(functional, x, spelling, dtype):
    """Positional, keyword, list, torch.Size: float32's values, rounded once."""
    call = functools.partial(SPELLINGS[spelling], x, functional.weight, functional.bias)
    expected = call()
    with low_precision_layernorm(), autocast(dtype):
        y = call()
    assert y.dtype is dtype
    assert torch.equal(y, expected.to(dtype))


def test_missing_argument_is_pythons_own_error(x):
    """A call that PyTorch refuses is refused with a TypeError that names the function."""
    with low_precision_layernorm(), pytest.raises(TypeError, match=r"layer_norm\(\) missing"):
        F.layer_norm(x)


def test_function_and_module_give_the_same(x):
    """The module's call is lowered once: bit for bit what the function gives."""
    module = nn.LayerNorm(8)
    nn.init.normal_(module.weight)
    with low_precision_layernorm(), autocast():
        y, z = module(x), F.layer_norm(x, (8,), module.weight, module.bias, module.eps)
    assert y.dtype is BF16
    assert torch.equal(y, z)


def test_gradients_keep_their_dtypes_and_are_float32s(functional, x):
    """The gradient of x has x's dtype, those of the parameters theirs."""
    x.requires_grad_()
    inputs = [x, functional.weight, functional.bias]
    upstream = torch.randn(4, 8).to(BF16)
    expected = torch.autograd.grad(functional(x), inputs, upstream.float())
    with low_precision_layernorm(), autocast():
        got = torch.autograd.grad(functional(x), inputs, upstream)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype is e.dtype
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.layer_norm(x.double(), (8,)),
        lambda x: F.layer_norm(x.double(), (8,), torch.ones(8).double()),
        lambda x: torch.layer_norm(x, (8,)),
    ],
)
def test_stock_calls_are_stock(x, call):
    """float64, and the operator that is not wrapped, stay as they are, bit for bit."""
    with autocast():
        expected = call(x)
        with low_precision_layernorm():
            y = call(x)
    assert y.dtype is expected.dtype
    assert torch.equal(y, expected)


def test_autocast_switched_off_around_the_call_stays_off(functional, x):
    """timm's fast_norm and others call the function in an autocast(enabled=False) region."""
    with low_precision_layernorm(), autocast(), autocast(enabled=False):
        assert functional(x).dtype is FP32


def test_float64_parameters_are_stock(x):
    """A float64 weight is PyTorch's business: its own error, whatever the backend."""
    weight = torch.ones(8, dtype=torch.float64)
    with autocast(), pytest.raises(RuntimeError) as stock:
        F.layer_norm(x, (8,), weight)
    with low_precision_layernorm(), autocast(), pytest.raises(RuntimeError) as ours:
        F.layer_norm(x, (8,), weight)
    assert str(ours.value) == str(stock.value)


def test_other_norms_are_stock_unless_asked_for(x):
    """The default is what the name promises: LayerNorm alone, and nothing else is patched."""
    before = F.group_norm
    with low_precision_layernorm(), autocast():
        assert F.group_norm is before
        assert nn.GroupNorm(2, 8)(x).dtype is FP32
        assert nn.LayerNorm(8)(x).dtype is BF16


@pytest.mark.parametrize("input_dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(4, 8), (2, 8, 5, 3)])
def test_group_norm_on_request(input_dtype, shape):
    """Module and function: float32's values and gradients, rounded once."""
    module = nn.GroupNorm(2, 8)
    nn.init.normal_(module.weight)
    x = torch.randn(shape).to(input_dtype).requires_grad_()
    expected = module(x.float())
    upstream = torch.randn(shape).to(BF16)
    wanted = torch.autograd.grad(expected, [x, module.weight], upstream.float())
    with low_precision_layernorm(norms="group_norm"), autocast():
        y = module(x)
        by_function = F.group_norm(input=x, num_groups=2, weight=module.weight, bias=module.bias)
        assert output_dtype(nn.LayerNorm(8)) is FP32
    assert y.dtype is by_function.dtype is BF16
    assert torch.equal(y, expected.to(BF16))
    assert torch.equal(y, by_function)
    for g, e in zip(torch.autograd.grad(y, [x, module.weight], upstream), wanted, strict=True):
        assert g.dtype is e.dtype
        assert torch.allclose(g.float(), e.float(), rtol=1e-2, atol=1e-2)


def test_group_norm_keeps_pytorchs_errors():
    """PyTorch checks the input of group_norm before the operator; so does a lowered call."""
    for x in (torch.randn(1, 2), torch.randn(8)):
        with pytest.raises(Exception, match=r".") as stock:
            F.group_norm(x, 2)
        with (
            low_precision_layernorm(norms="all"),
            autocast(),
            pytest.raises(stock.type, match=f"^{re.escape(str(stock.value))}$"),
        ):
            F.group_norm(x, 2)


@needs_rms_norm
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_rms_norm_on_request(x, input_dtype, eps):
    """Module and function: float32's values, rounded once; the default eps is float32's."""
    module = nn.RMSNorm(8, eps=eps)
    nn.init.normal_(module.weight)
    x = (x * 1e-3).to(input_dtype)  # so small that eps counts
    expected = F.rms_norm(x.float(), (8,), module.weight, eps)
    with low_precision_layernorm(norms=["rms_norm"]), autocast():
        y = module(x)
        by_function = F.rms_norm(x, normalized_shape=(8,), weight=module.weight, eps=eps)
    assert y.dtype is BF16
    assert torch.equal(y, expected.to(BF16))
    assert torch.equal(y, by_function)


def test_innermost_block_decides_which_norms(x):
    """norms belong to the request: an inner block's replace the outer one's."""
    both = nn.LayerNorm(8), nn.GroupNorm(2, 8)

    def dtypes():
        return [output_dtype(norm, x) for norm in both]

    with low_precision_layernorm(norms="all"):
        assert dtypes() == [BF16, BF16]
        with low_precision_layernorm():
            assert dtypes() == [BF16, FP32]
        with low_precision_layernorm(norms="group_norm"):
            assert dtypes() == [FP32, BF16]
        assert dtypes() == [BF16, BF16]
    assert dtypes() == [FP32, FP32]


def test_torchscript_gets_the_stock_function(functional, x):
    """script and trace compile torch's own source, while lowering is active and afterwards."""

    def scale(x):
        return torch.nn.functional.layer_norm(x, (8,)) * 2

    def groups(x):
        return torch.nn.functional.group_norm(x, 2)

    expected = functional(x), scale(x), groups(x)
    with low_precision_layernorm(norms="all"), autocast():
        scripted = [torch.jit.script(f) for f in (functional, scale, groups, nn.LayerNorm(8))]
        with low_precision_layernorm("fp32"):
            traced = torch.jit.trace(functional, x)
    for module, wanted in zip(scripted, expected, strict=False):
        assert torch.equal(module(x), wanted)
    assert torch.equal(traced(x), expected[0])


def test_fx_names_the_function_and_follows(functional, x):
    """An fx graph calls F.layer_norm by its name: lowered when it runs lowered."""
    with low_precision_layernorm():
        graph = torch.fx.symbolic_trace(functional)
    assert "torch.nn.functional.layer_norm" in graph.code
    graph = pickle.loads(pickle.dumps(graph))
    assert output_dtype(graph, x) is FP32
    with low_precision_layernorm():
        assert output_dtype(graph, x) is BF16
    lpln.disable()
    assert output_dtype(graph, x) is FP32


class Logged(torch.Tensor):
    """A subclass that sees every function that is called on it."""

    functions: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.functions.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclass_with_torch_function_sees_the_function_and_is_lowered(functional, x):
    """A subclass is handed one call of layer_norm, as without us, and its inner call is lowered."""
    y = x.as_subclass(Logged)
    Logged.functions.clear()
    with low_precision_layernorm(), autocast():
        z = functional(y)
        seen = list(Logged.functions)
    assert type(z) is Logged
    assert z.dtype is BF16
    assert seen == [F.layer_norm]


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="a device is a context from torch 2.0 on")
def test_function_modes_are_lowered_beneath(functional, x):
    """`with torch.device(...)` is a function mode: calls beneath it are lowered."""
    with torch.device("cpu"), low_precision_layernorm(), autocast():
        assert functional(x).dtype is BF16


def test_threads_share_the_active_request(functional, x):
    """The state is the process's: a call in another thread is lowered."""
    dtypes = []
    with low_precision_layernorm():
        thread = threading.Thread(target=lambda: dtypes.append(output_dtype(functional, x)))
        thread.start()
        thread.join()
    assert dtypes == [BF16]


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="torch.func is in torch >= 2.0")
def test_functorch_transforms(functional, x):
    """vmap, grad and jvp over the function run lowered."""
    with low_precision_layernorm(), autocast():
        assert torch.func.vmap(functional)(x).dtype is BF16
        gradient = torch.func.grad(lambda x: functional(x).float().sum())(x)
        y, tangent = torch.func.jvp(functional, (x,), (x,))
    assert gradient.dtype is FP32
    assert y.dtype is tangent.dtype is BF16


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputes_as_forward_ran(functional, x, use_reentrant):
    """A recomputation after disable() is lowered, and gives the same gradients."""
    seen = []

    def block(x):
        y = functional(x)
        seen.append(y.dtype)
        return y.float().square()

    gradients = []
    for checkpointed in (False, True):
        leaf = x.clone().requires_grad_()
        with low_precision_layernorm(), autocast():
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(block, leaf, use_reentrant=use_reentrant)
            else:
                y = block(leaf)
        lpln.disable()
        y.sum().backward()
        gradients.append(leaf.grad)
    assert seen == [BF16] * 3
    assert torch.equal(*gradients)


def plain(original):
    def theirs(*args, **kwargs):
        return original(*args, **kwargs) + 1

    return theirs


def with_wrapt(original):
    return wrapt.FunctionWrapper(original, lambda f, instance, args, kwargs: f(*args, **kwargs) + 1)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("theirs", [plain, with_wrapt])
def test_foreign_function_runs_as_it_is(functional, x, theirs, order, monkeypatch):
    """Whenever somebody puts one there: PyTorch's, which it calls, is lowered."""
    stock = functional(x)
    if order == "after":
        lpln.enable()
    monkeypatch.setattr(F, "layer_norm", foreign := theirs(F.layer_norm))
    lpln.enable()
    with autocast():
        assert torch.equal(functional(x), stock.to(BF16) + 1)
        by_keyword = F.layer_norm(input=x, normalized_shape=(8,))
        assert torch.equal(by_keyword, torch.layer_norm(x, (8,)).to(BF16) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpln.disable()
    assert F.layer_norm is foreign
    assert torch.equal(functional(x), stock + 1)


def test_what_runs_takes_the_parameters_of_pytorchs_function():
    """A parameter that a later torch adds fails here, by name."""
    for name, function in _norms.FUNCTIONS.items():
        ours, theirs = inspect.signature(function), inspect.signature(getattr(F, name))
        assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
            (p.name, p.kind, p.default) for p in theirs.parameters.values()
        ], name


def test_function_can_be_pickled_and_copied():
    """The function pickles and copies by its name, as torch's own."""
    with low_precision_layernorm():
        assert pickle.loads(pickle.dumps(F.layer_norm)) is F.layer_norm
        assert copy.deepcopy(F.layer_norm) is F.layer_norm
        assert inspect.getsource(F.layer_norm).startswith("def layer_norm(")


class Calls(nn.Module):
    """A module that calls each norm, by module and by function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)

    def forward(self, x):
        return self.layer(x), F.layer_norm(x, (8,)), self.group(x), F.group_norm(x, 2)


def dtypes_of(run, x):
    with autocast():
        return "".join("l" if y.dtype is BF16 else "s" for y in run(x))


@needs_dynamo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_obeys_the_switch(x, backend):
    """Stock first, on, off, on, other norms: with fullgraph, and each variant is compiled once."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    run = torch.compile(Calls(), fullgraph=True, backend=count)
    assert dtypes_of(run, x) == "ssss"
    for _ in range(2):
        with low_precision_layernorm():
            assert dtypes_of(run, x) == "llss"
        assert dtypes_of(run, x) == "ssss"
        with low_precision_layernorm(norms="all"):
            assert dtypes_of(run, x) == "llll"
    compiled = len(graphs)
    for _ in range(2):
        lpln.disable()
        assert dtypes_of(run, x) == "ssss"
        lpln.enable(norms="all")
        assert dtypes_of(run, x) == "llll"
    # Stock, layer_norm lowered, both lowered.
    assert compiled == 3
    assert len(graphs) == compiled


@needs_dynamo
def test_foreign_function_wrapper_above_is_looked_through(x):
    """Dynamo runs what a wrapt.FunctionWrapper wraps, ours, without an error of its guards."""
    original = F.layer_norm
    lpln.enable()
    F.layer_norm = wrapt.FunctionWrapper(F.layer_norm, lambda f, i, a, k: f(*a, **k))
    try:
        run = torch.compile(Calls(), fullgraph=True, backend="aot_eager")
        assert dtypes_of(run, x) == "llss"
        with low_precision_layernorm("fp32"):
            assert dtypes_of(run, x) == "ssss"
    finally:
        F.layer_norm = original
