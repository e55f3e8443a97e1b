"""exempt(): whatever a module's forward calls stays stock, in eager and compiled code."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from support import autocast, needs_dynamo, output_dtype

import lpln_autopatch as lpln
from lpln_autopatch import LPLayerNorm, low_precision_layernorm
from lpln_autopatch._torch_compat import HAS_RMS_NORM, TORCH_VERSION

BF16, FP32 = torch.bfloat16, torch.float32
nn = torch.nn

# On older ones a module whose forward is its own is lowered even if it is exempt.
pytestmark = pytest.mark.skipif(
    TORCH_VERSION < (2, 0),
    reason="before torch 2.0 hooks do not run if a forward raises; CI runs this on later ones",
)


class Functional(nn.Module):
    """A norm of its own."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.breaks, self.fails = breaks, False

    def forward(self, x):
        if self.breaks:
            torch._dynamo.graph_break()
        y = F.layer_norm(x, (8,))
        if self.fails:
            raise KeyError("in forward")
        return y


class Permuted(nn.LayerNorm):
    """Like timm's LayerNorm2d: torch's forward in one of its own."""

    def forward(self, x):
        return super().forward(x.unsqueeze(0)).squeeze(0)


class Model(nn.Module):
    """The dtypes that its norms give, as one letter each: l(owered) or s(tock)."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Functional(breaks), nn.LayerNorm(8), Functional(), Permuted(8)])
        self.groups = nn.GroupNorm(2, 8)

    def forward(self, x):
        return [norm(x) for norm in (*self.norms, self.groups)]


def letters(run, x=None):
    with autocast():
        outputs = run(torch.randn(4, 8) if x is None else x)
    return "".join("l" if y.dtype is BF16 else "s" for y in outputs)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def lowered():
    with low_precision_layernorm(norms="all"):
        yield


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


modes = pytest.mark.parametrize("mode", [lambda m: m, pytest.param(compiled, marks=needs_dynamo)])


@modes
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("norms.0", "sllll"),
        ("norms.1", "lslll"),
        ("norms.3", "lllsl"),
        ("groups", "lllls"),
        ("norms", "ssssl"),
        ("", "sssss"),
    ],
)
def test_what_the_forward_calls_is_stock(model, lowered, mode, name, expected):
    """A call in an exempt forward is stock, compiled or not, until exempt(module, False)."""
    run = mode(model)
    module = model.get_submodule(name)
    assert lpln.exempt(module) is module
    assert letters(run) == expected
    lpln.exempt(module, False)
    assert letters(run) == "lllll"
    lpln.exempt(module)
    lpln.exempt(module)
    assert letters(run) == expected
    lpln.exempt(module, False)
    assert letters(run) == "lllll"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_values_are_stock_bit_for_bit(model, lowered):
    """An exempt module gives what it gives without us, gradients included."""
    x = torch.randn(4, 8, requires_grad=True)
    with low_precision_layernorm("fp32"), autocast():
        expected = model(x)
    lpln.exempt(model)
    with autocast():
        got = model(x)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (g, e)))


TORCHS_NORMS = [nn.LayerNorm(8), nn.GroupNorm(2, 8)] + ([nn.RMSNorm(8)] if HAS_RMS_NORM else [])
of_torchs_norms = pytest.mark.parametrize(
    "norm", TORCHS_NORMS, ids=lambda norm: type(norm).__name__
)


@of_torchs_norms
def test_forward_that_is_called_by_itself(lowered, norm):
    """module.forward(x) runs no hooks; the mark of a norm of torch's counts all the same."""
    norm = lpln.exempt(copy.deepcopy(norm))
    assert output_dtype(norm) is FP32
    with autocast():
        assert norm.forward(torch.randn(4, 8)).dtype is FP32
        assert (
            type(norm)(*((2, 8) if isinstance(norm, nn.GroupNorm) else (8,)))
            .forward(torch.randn(4, 8))
            .dtype
            is BF16
        )


def give_it_a_forward(module):
    module.forward = lambda x: F.layer_norm(x, (8,))


def give_it_a_class(module):
    module.__class__ = type(
        "Another", (Functional, type(module)), {"breaks": False, "fails": False}
    )


@modes
@of_torchs_norms
@pytest.mark.parametrize("change", [give_it_a_forward, give_it_a_class])
def test_norm_that_is_changed_after_the_mark_is_stock(lowered, norm, change, mode):
    """Another forward, or another class, whose forward calls a function by itself."""
    norm, other = lpln.exempt(copy.deepcopy(norm)), copy.deepcopy(norm)
    for module in (norm, other):
        change(module)
    assert output_dtype(mode(norm)) is FP32
    assert output_dtype(mode(other)) is BF16


def test_fast_path_of_an_exempt_encoder_stays(lowered):
    """nn.TransformerEncoderLayer takes it in eval() if nothing in it has hooks: the same bits."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    x = torch.randn(2, 4, 8)
    with torch.no_grad(), autocast():
        expected = layer(x)
        assert torch.equal(lpln.exempt(layer)(x), expected)


def test_exception_in_an_exempt_forward_ends_it(model, lowered):
    """An exempt module that raises ends its exemption: others are lowered as before."""
    lpln.exempt(model.norms[0])
    model.norms[0].fails = True
    for _ in range(2):
        with pytest.raises(KeyError):
            letters(model)
    model.norms[0].fails = False
    assert letters(model) == "sllll"


def test_foreign_hook_that_raises_before_ours_ends_nothing(lowered):
    """A hook that was prepended after the mark, and raises, leaves the modules around stock."""

    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Functional()

        def forward(self, x):
            with contextlib.suppress(KeyError):
                self.inner(x)
            return [F.layer_norm(x, (8,))]

    def raises(module, args):
        raise KeyError("in a hook")

    model = lpln.exempt(Catches())
    model.inner.register_forward_pre_hook(raises, prepend=True)
    assert letters(model) == "s"
    assert output_dtype(Functional()) is BF16


def test_exempt_modules_in_a_thread_pool_are_stock(lowered):
    """Marked modules are, in whatever thread they run."""
    model = lpln.exempt(nn.ModuleList([nn.LayerNorm(8), nn.GroupNorm(2, 8), Functional()]))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert [*pool.map(output_dtype, model)] == [FP32] * 3


def test_threads_are_exempt_by_themselves(lowered):
    """The calls of a thread are lowered while another thread is inside an exempt module."""
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            assert go_on.wait(60)
            return [F.layer_norm(x, (8,))]

    seen = []
    waits = lpln.exempt(Waits())
    thread = threading.Thread(target=lambda: seen.append(letters(waits)))
    thread.start()
    assert inside.wait(60)
    assert output_dtype(Functional()) is BF16
    go_on.set()
    thread.join()
    assert seen == ["s"]


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save]
)
def test_exemption_goes_along_with_copies(model, lowered, duplicate):
    """Through deepcopy, pickle and torch.save, and exempt(copy, False) ends it in the copy."""
    lpln.exempt(model.norms)
    twin = duplicate(model)
    assert letters(twin) == "ssssl"
    lpln.exempt(twin, False)
    assert letters(twin) == "lllll"
    assert letters(model) == "ssssl"
    assert not any("lpln" in key for key in model.state_dict())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_inside_an_exempt_module_recomputes_stock(lowered, use_reentrant):
    """A function that an exempt module checkpoints is stock in both of its runs."""
    seen = []

    class Checkpoints(nn.Module):
        def forward(self, x):
            def function(x):
                y = F.layer_norm(x, (8,))
                seen.append(y.dtype)
                return y.square()

            checkpoint = torch.utils.checkpoint.checkpoint
            return checkpoint(function, x, use_reentrant=use_reentrant)

    with autocast():
        y = lpln.exempt(Checkpoints())(torch.randn(4, 8, requires_grad=True))
    y.sum().backward()
    assert seen == [FP32, FP32]


@of_torchs_norms
def test_exempt_norm_can_be_scripted(lowered, norm):
    """TorchScript compiles its hooks, which have the types of its forward."""
    norm = lpln.exempt(copy.deepcopy(norm))
    assert output_dtype(torch.jit.script(norm)) is FP32


@needs_dynamo
def test_graph_break_inside_an_exempt_module_stays_stock(lowered):
    """The code behind a graph break in an exempt forward is stock, in every thread."""
    model = Model(breaks=True)
    lpln.exempt(model.norms[0])
    run = torch.compile(model, backend="aot_eager")
    seen = [letters(run)]
    thread = threading.Thread(target=lambda: seen.append(letters(run)))
    thread.start()
    thread.join()
    assert seen == ["sllll"] * 2


def foreign_layer_norm(monkeypatch):
    """Another patcher's function is what LayerNorm.forward is, beneath the wrapper."""
    torchs_own = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: torchs_own(self, x))
    return nn.LayerNorm(8)


SHARING = {
    "LayerNorm": lambda _: nn.LayerNorm(8),
    "beneath another patcher": foreign_layer_norm,
    "surgery": lambda _: LPLayerNorm(8),
    "GroupNorm": lambda _: nn.GroupNorm(2, 8),
    "a forward of its own": lambda _: Functional(),
}


@needs_dynamo
@pytest.mark.parametrize("first", ["exempt", "plain"])
@pytest.mark.parametrize("thread", ["this", "another"])
@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_exempt_module_shares_no_compiled_code(request, monkeypatch, make, thread, first):
    """A model that is compiled block by block, where a module of one block is exempt."""
    norm = make(monkeypatch)
    request.getfixturevalue("lowered")
    blocks = [nn.Sequential(norm), nn.Sequential(copy.deepcopy(norm))]
    lpln.exempt(blocks[0][0])
    if first == "plain":
        blocks.reverse()
    seen = []

    def compile_both():
        seen.extend(output_dtype(compiled(block)) for block in blocks)

    if thread == "this":
        compile_both()
    else:
        other = threading.Thread(target=compile_both)
        other.start()
        other.join()
    assert seen == ([FP32, BF16] if first == "exempt" else [BF16, FP32])


MASK = torch.tensor([True, False, True, True])
AFTER_A_NORM = {
    "numpy": lambda y: y.detach().numpy(),
    "mask": lambda y: torch.zeros(4, 8).__setitem__(MASK, y[MASK]),
    "scatter": lambda y: torch.zeros(4, 8).scatter(0, torch.zeros(4, 8, dtype=torch.long), y),
    "index_add": lambda y: torch.zeros(4, 8).index_add(0, torch.arange(4), y),
    "masked_scatter": lambda y: torch.zeros(4, 8).masked_scatter(MASK[:, None], y),
    "quantized Linear": lambda y: torch.ao.quantization.quantize_dynamic(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), {torch.nn.Linear}
    )(y),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(TORCH_VERSION < (2, 5), reason="the list in docs/pitfalls.md is of later ones")
@pytest.mark.parametrize("after", AFTER_A_NORM.values(), ids=AFTER_A_NORM)
def test_what_takes_float32_alone_works_behind_an_exempt_norm(layer_norm, after):
    """docs/pitfalls.md: it raises behind a lowered norm, and not behind an exempt one."""
    with low_precision_layernorm(), autocast(), torch.no_grad():
        with pytest.raises((RuntimeError, TypeError)):
            after(layer_norm(torch.randn(4, 8)))
        lpln.exempt(layer_norm)
        after(layer_norm(torch.randn(4, 8)))


class InFloat32(Functional):
    """A class that a program exempts."""


class Derived(InFloat32):
    """A norm with a forward of its own."""

    def forward(self, x):
        return F.layer_norm(x, (8,))


class WithACallOfItsOwn(InFloat32):
    """A class with a __call__ of its own, as diffusers' decorated modules have."""

    def __call__(self, x):
        return super().__call__(x)


@pytest.fixture
def exempt_class():
    """Exempts classes, for the test."""
    with contextlib.ExitStack() as stack:

        def exempts(cls):
            stack.callback(lpln.exempt, cls, False)
            return lpln.exempt(cls)

        yield exempts


@modes
@pytest.mark.parametrize("cls", [InFloat32, Derived, WithACallOfItsOwn])
def test_instances_of_an_exempt_class_are_stock(lowered, exempt_class, mode, cls):
    """Instances are stock, earlier and later, of subclasses, and copies, until the mark goes."""
    model = nn.Sequential(cls())
    run = mode(model)
    assert output_dtype(run) is BF16
    assert exempt_class(InFloat32) is InFloat32
    lpln.exempt(InFloat32)
    later = mode(nn.Sequential(cls()))
    twin = mode(pickle.loads(pickle.dumps(model)))
    assert [output_dtype(each) for each in (run, later, twin)] == [FP32] * 3
    assert output_dtype(mode(Functional())) is BF16
    lpln.exempt(InFloat32, False)
    assert [output_dtype(each) for each in (run, later, twin)] == [BF16] * 3
    assert ("__call__" in vars(cls)) == (cls is WithACallOfItsOwn)


def test_classes_may_be_unmarked_in_any_order():
    """The mark of a base that ends before that of a subclass leaves nothing on either."""
    for cls in (InFloat32, Derived):
        lpln.exempt(cls)
    for cls in (InFloat32, Derived):
        lpln.exempt(cls, False)
    assert "__call__" not in {**vars(InFloat32), **vars(Derived)}


@modes
def test_exempt_class_of_torchs(lowered, exempt_class, mode):
    """LayerNorm itself, its forward called by itself, surgery and TorchScript."""
    exempt_class(nn.LayerNorm)
    for norm in (nn.LayerNorm(8), LPLayerNorm(8)):
        assert output_dtype(mode(norm)) is FP32
        with autocast():
            assert norm.forward(torch.randn(4, 8)).dtype is FP32
    assert output_dtype(torch.jit.script(nn.LayerNorm(8))) is FP32
    assert output_dtype(mode(nn.GroupNorm(2, 8))) is BF16


def test_exempt_class_beneath_another_patcher_is_stock(lowered, monkeypatch):
    """Another patcher's __call__ above ours stays there, and lowers again afterwards."""
    lpln.exempt(Derived)
    ours = Derived.__call__
    monkeypatch.setattr(Derived, "__call__", lambda self, x: ours(self, x))
    assert output_dtype(Derived()) is FP32
    lpln.exempt(Derived, False)
    assert output_dtype(Derived()) is BF16
