from __future__ import annotations

import copy
import enum
import gc
import io
import pickle
import textwrap
import threading
import warnings
import weakref

import pytest
import torch
from support import AUTOCAST_DTYPES, autocast, needs_dynamo, output_dtype, run_forked
from torch import nn

import lpln_autopatch as lpln
from lpln_autopatch import (
    LPLayerNorm,
    NoEffectWarning,
    apply_low_precision_layernorm,
    low_precision_layernorm,
    revert_low_precision_layernorm,
)
from lpln_autopatch._torch_compat import TORCH_VERSION

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class WithALock(torch.nn.LayerNorm):
    """A subclass that holds an object that cannot be pickled, and leaves it out."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {**vars(self), "lock": None}


class Inherits(nn.LayerNorm):
    """A subclass that runs LayerNorm's forward. At the top of a module, so that it pickles."""

    def describe(self):
        return "mine"


class Overrides(nn.LayerNorm):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias)


class ComposerPrecision(enum.Enum):
    """Composer's enum as far as it concerns us."""

    AMP_BF16 = "amp_bf16"


@pytest.fixture
def model():
    shared = nn.LayerNorm(8)
    carries = nn.LayerNorm(8)
    carries.forward = lambda x: x
    return nn.ModuleDict(
        {
            "norm": nn.LayerNorm(8),
            "shared": shared,
            "again": shared,
            "inherits": Inherits(8),
            "overrides": Overrides(8),
            "carries": carries,
            "linear": nn.Linear(8, 8),
        }
    )


LOWERED = {"norm", "shared", "inherits"}


def dtypes(model: nn.ModuleDict) -> dict[str, torch.dtype]:
    return {name: output_dtype(module) for name, module in model.items() if name != "linear"}


def test_apply_lowers_what_runs_torchs_forward(model):
    """The changed modules are returned by name and lowered; all others are left alone."""
    changed = apply_low_precision_layernorm(model)
    assert changed.keys() == LOWERED
    assert all(changed[name] is model[name] for name in changed)
    lowered = {name for name, dtype in dtypes(model).items() if dtype is BF16}
    assert lowered == LOWERED | {"again"}
    assert type(model["overrides"]) is Overrides
    assert type(model["norm"]) is LPLayerNorm
    assert isinstance(model["inherits"], Inherits)
    assert model["inherits"].describe() == "mine"


def test_nothing_but_the_class_changes(model):
    """Parameters, hooks, flags, names and the state_dict are the same objects and values."""
    seen: list[torch.dtype] = []
    model["norm"].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    model.eval()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    apply_low_precision_layernorm(model, optimizers=optimizer)
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert not model["norm"].training
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert state.keys() == model.state_dict().keys()
    assert output_dtype(model["norm"]) is BF16
    assert seen == [BF16]


def test_root_module_is_changed_in_place(layer_norm):
    """A LayerNorm that is the model itself is changed in place."""
    assert apply_low_precision_layernorm(layer_norm) == {"": layer_norm}
    assert output_dtype(layer_norm) is BF16
    assert revert_low_precision_layernorm(layer_norm) == {"": layer_norm}
    assert type(layer_norm) is nn.LayerNorm
    assert output_dtype(layer_norm) is FP32


def test_revert_gives_every_class_back(model):
    """Classes and the instances' attributes are as before after the reversal."""
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    apply_low_precision_layernorm(model)
    assert revert_low_precision_layernorm(model).keys() == LOWERED
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    assert BF16 not in dtypes(model).values()
    assert revert_low_precision_layernorm(model) == {}


@pytest.mark.parametrize("precision", ["bf16", "AMP_BF16", BF16, ComposerPrecision.AMP_BF16])
@pytest.mark.skipif(FP16 not in AUTOCAST_DTYPES, reason="autocast on CPU has only bfloat16 there")
def test_second_apply_replaces_the_first(model, precision):
    """Precision and backend are those of the last apply; Composer's spellings are taken."""
    apply_low_precision_layernorm(model, "amp_fp16")
    apply_low_precision_layernorm(model, precision)
    assert output_dtype(model["inherits"], dtype=BF16) is BF16
    with pytest.warns(NoEffectWarning):
        assert output_dtype(model["inherits"], dtype=FP16) is FP32


def hooked_after_surgery() -> nn.LayerNorm:
    """Return a module whose hook, as accelerate's, holds surgery's forward, after the reversal."""
    norm = nn.LayerNorm(8)
    apply_low_precision_layernorm(norm)
    norm.forward = norm.forward
    revert_low_precision_layernorm(norm)
    return norm


def test_reverted_module_that_a_hook_holds_is_torchs():
    """A forward that a hook took from surgery is LayerNorm.forward again after the reversal."""
    norm = hooked_after_surgery()
    x = torch.randn(4, 8)
    assert torch.equal(norm(x), nn.functional.layer_norm(x, (8,)))
    assert output_dtype(norm) is FP32
    with low_precision_layernorm():
        assert output_dtype(norm) is BF16


@needs_dynamo
def test_reverted_module_that_a_hook_holds_compiles():
    """A forward that a hook took is LayerNorm's in compiled code too, without a graph break."""
    compiled = torch.compile(hooked_after_surgery(), fullgraph=True, backend="eager")
    assert output_dtype(compiled) is FP32
    with low_precision_layernorm():
        assert output_dtype(compiled) is BF16


def test_precision_that_never_engages_warns_and_undoes(model):
    """fp32 and fp16 warn, as in Composer, and leave the model stock."""
    apply_low_precision_layernorm(model)
    with pytest.warns(NoEffectWarning, match="fp32") as caught:
        assert apply_low_precision_layernorm(model, "fp32") == {}
    assert caught[0].filename == __file__
    assert BF16 not in dtypes(model).values()


def test_model_without_layernorm_warns():
    """Nothing to lower is a NoEffectWarning, and the same type comes back."""
    with pytest.warns(NoEffectWarning, match="No LayerNorm"):
        assert apply_low_precision_layernorm(nn.Linear(2, 2)) == {}


def test_refused_surgery_changes_nothing(model):
    """A wrong model, precision or backend is an error before anything is changed."""
    for arguments in ((model, "bf61"), (model, "amp", None, "cuda")):
        with pytest.raises(ValueError, match="Valid: "):
            apply_low_precision_layernorm(*arguments)
    for function in (apply_low_precision_layernorm, revert_low_precision_layernorm):
        with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not <class 'str'>\."):
            function("model")
    assert BF16 not in dtypes(model).values()


def test_surgery_and_activation_are_independent(model):
    """Blocks and disable() do not touch surgery; both together lower once."""
    other = nn.LayerNorm(8)
    apply_low_precision_layernorm(model["norm"])
    assert not lpln.status().installed
    assert output_dtype(other) is FP32
    x = torch.randn(4, 8)
    with autocast():
        expected = model["norm"](x)
        with low_precision_layernorm():
            assert torch.equal(model["norm"](x), expected)
            with low_precision_layernorm("fp32"):
                assert torch.equal(model["norm"](x), expected)
    lpln.disable()
    assert output_dtype(model["norm"]) is BF16


def test_values_and_gradients_are_the_global_patchs(layer_norm):
    """Surgery computes what the patch computes, bit for bit; outside autocast it is stock."""

    def run(context):
        x = torch.linspace(-3, 3, 32).view(4, 8).requires_grad_()
        with context:
            y = layer_norm(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer_norm.parameters()])]

    stock = run(autocast(enabled=False))
    with low_precision_layernorm():
        patched = run(autocast())
    apply_low_precision_layernorm(layer_norm)
    for got, expected in ((run(autocast()), patched), (run(autocast(enabled=False)), stock)):
        for g, e in zip(got, expected, strict=True):
            assert g.dtype is e.dtype
            assert torch.equal(g, e)


def test_subclass_of_lplayernorm_keeps_its_class():
    """A class that a user derives from LPLayerNorm takes a new precision, and is not reverted."""

    class Mine(LPLayerNorm):
        pass

    norm = Mine(8)
    assert apply_low_precision_layernorm(norm, "amp_bf16") == {"": norm}
    assert type(norm) is Mine
    assert norm._request.precision == "amp_bf16"
    assert revert_low_precision_layernorm(norm) == {}
    assert output_dtype(norm) is BF16


def test_subclass_of_lplayernorm_follows_a_precision_that_never_engages():
    """`fp32` leaves an instance of a user's class stock, and the next precision lowers it again."""

    class Mine(LPLayerNorm):
        pass

    norm = Mine(8)
    with pytest.warns(lpln.NoEffectWarning):
        assert apply_low_precision_layernorm(norm, "fp32") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert output_dtype(norm) is FP32
    apply_low_precision_layernorm(norm)
    assert output_dtype(norm) is BF16


def test_state_that_a_class_hides_stays_hidden():
    """A subclass whose __getstate__ leaves a lock out is copied and pickled as before surgery."""
    norm = WithALock(8)
    apply_low_precision_layernorm(norm)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert output_dtype(other) is BF16
        assert other.lock is None
        revert_low_precision_layernorm(other)
        assert type(other) is WithALock


def test_class_on_its_own_is_lowered():
    """LPLayerNorm takes LayerNorm's arguments, and a precision; exempt() holds for it too."""
    norm = LPLayerNorm(8, eps=1e-3, elementwise_affine=False)
    assert norm.eps == 1e-3
    assert output_dtype(norm) is BF16
    assert output_dtype(lpln.exempt(norm)) is FP32
    with pytest.raises(ValueError, match="bf61"):
        LPLayerNorm(8, precision="bf61")
    if TORCH_VERSION >= (2, 1):
        assert LPLayerNorm(8, bias=False).bias is None


def test_copies_and_pickles_stay_lowered(model):
    """deepcopy, pickle and torch.save of a whole model keep it lowered, subclasses too."""
    del model["carries"]  # its lambda does not pickle
    apply_low_precision_layernorm(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    trusted = {"weights_only": False} if TORCH_VERSION >= (2, 0) else {}
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, **trusted),
    ]
    for other in copies:
        assert {n for n, d in dtypes(other).items() if d is BF16} == LOWERED | {"again"}
        assert other["inherits"].describe() == "mine"
        assert other["shared"] is other["again"]
        revert_low_precision_layernorm(other)
        assert type(other["inherits"]) is Inherits


def test_state_dict_loads_both_ways(model):
    """A state_dict of a lowered model loads into a stock one, and the reverse."""
    stock = copy.deepcopy(model)
    apply_low_precision_layernorm(model)
    stock.load_state_dict(model.state_dict())
    model.load_state_dict(stock.state_dict())


def test_torchscript_compiles_the_stock_forward():
    """A lowered module can be scripted, and is stock then."""
    norm = LPLayerNorm(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(norm)
    assert output_dtype(scripted) is FP32


@needs_dynamo
def test_compiled_model_follows(layer_norm):
    """A model compiled before the surgery follows it, and its reversal, without a graph break."""
    model = nn.Sequential(nn.Tanh(), layer_norm)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert output_dtype(compiled) is FP32
    for _ in range(2):
        apply_low_precision_layernorm(compiled)
        assert output_dtype(compiled) is BF16
        revert_low_precision_layernorm(compiled)
        assert output_dtype(compiled) is FP32


def test_saved_model_whose_backend_is_missing_is_normalised_natively(layer_norm, tmp_path):
    """A model that was saved whole with surgery backend="fused" loads and runs without Triton.

    With the backend there, it is used again.
    """
    code = """
        import sys, torch, warnings
        import lpln_autopatch as lpln
        from lpln_autopatch import backends

        def mine(x, *arguments):
            calls.append(x)
            return backends.native.normalise(x, *arguments)

        calls = []
        if sys.argv[1] == "save":
            backends._BUILT_IN["fused"] = lambda: mine
            model = torch.nn.Sequential(torch.nn.LayerNorm(8))
            lpln.apply_low_precision_layernorm(model, backend="fused")
            torch.save(model, sys.argv[2])
        else:
            sys.modules["triton"] = None
            if sys.argv[1] == "there":
                backends._BUILT_IN["fused"] = lambda: mine
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = torch.load(sys.argv[2], weights_only=False)
            print([w.category.__name__ for w in caught if "'fused'" in str(w.message)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            print(model(torch.randn(2, 8)).dtype, len(calls))
    """
    results = [
        run_forked("-c", textwrap.dedent(code), how, str(tmp_path / "model.pt")).stdout.split("\n")
        for how in ("save", "there", "missing")
    ]
    assert results == [
        ["torch.bfloat16 1", ""],
        ["[]", "torch.bfloat16 1", ""],
        # Before torch 2.6 `fused` needs no Triton: it is native there.
        ["['RuntimeWarning']" if TORCH_VERSION >= (2, 6) else "[]", "torch.bfloat16 0", ""],
    ]


def test_subclass_that_cannot_be_subclassed_leaves_nothing_half_done(layer_norm):
    """The subclass's error passes, and every module is as before, earlier ones too."""

    class Final(nn.LayerNorm):
        def __init_subclass__(cls) -> None:
            raise TypeError("Final is final")

    model = nn.Sequential(layer_norm, Final(8), nn.LayerNorm(8))
    with pytest.raises(TypeError, match="Final is final"):
        apply_low_precision_layernorm(model)
    assert [type(module) for module in model] == [nn.LayerNorm, Final, nn.LayerNorm]
    assert not any("_request" in vars(module) for module in model)


def test_class_of_a_subclass_goes_with_it():
    """A class that surgery made lives as long as a module of it, and the subclass no longer."""

    def change_one() -> weakref.ref:
        cls = type("Passing", (nn.LayerNorm,), {})
        first, second = cls(8), cls(8)
        apply_low_precision_layernorm(nn.ModuleList([first, second]))
        assert type(first) is type(second) is not cls
        return weakref.ref(cls)

    passing = change_one()
    gc.collect()  # our class, whose entry holds theirs
    gc.collect()
    assert passing() is None


class BehindGraphBreaks(nn.Module):
    """LayerNorms of different widths, none of which is in a graph."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in range(8, 20))

    def forward(self, x):
        torch._dynamo.graph_break()
        for width, norm in enumerate(self.norms, 8):
            torch._dynamo.graph_break()
            y = norm(x[:, :width])
        return y


@needs_dynamo
@pytest.mark.parametrize("surgery", [False, True])
def test_norms_behind_graph_breaks_are_no_frames_of_their_own(surgery):
    """No frame is compiled for a norm behind a graph break, as for stock; for itself, one is."""
    from torch._dynamo.testing import CompileCounter

    model, norm, count = BehindGraphBreaks(), nn.LayerNorm(8), CompileCounter()
    if surgery:
        apply_low_precision_layernorm(nn.ModuleList([model, norm]))
    dtype = BF16 if surgery else FP32
    assert output_dtype(torch.compile(model, backend=count), torch.randn(4, 32)) is dtype
    assert count.frame_count == 0
    assert output_dtype(torch.compile(norm, backend=count, fullgraph=True)) is dtype
    assert count.frame_count == 1


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="torch 1.13's parametrize differs; CI runs it")
def test_parametrized_layernorm_is_lowered():
    """The class that a parametrization makes inherits forward: lowered, with its weight."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    norm = nn.LayerNorm(8)
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    x = torch.randn(4, 8)
    expected = norm(x)
    apply_low_precision_layernorm(norm)
    with autocast():
        torch.testing.assert_close(norm(x), expected.to(BF16))
    revert_low_precision_layernorm(norm)
    assert torch.equal(norm(x), expected)
    nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is nn.LayerNorm


class Passed(torch.Tensor):
    """A subclass that hands every function on."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="a device is a context from torch 2.0 on")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_dynamo)])
def test_surgery_is_lowered_inside_function_modes(compiled):
    """`with torch.device(...)`, and a tensor subclass, leave a module under surgery lowered."""
    model = nn.Sequential(nn.LayerNorm(8))
    apply_low_precision_layernorm(model)
    run = torch.compile(model, backend="eager") if compiled else model
    x = torch.randn(4, 8, requires_grad=True)
    with autocast():
        expected = model(x)
        with torch.device("cpu"):
            y = run(x)
        passed = model(x.as_subclass(Passed))
    assert y.dtype is passed.dtype is expected.dtype is BF16
    assert type(passed) is Passed
    # Compiled code rounds x first.
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    y.sum().backward()
    assert x.grad is not None


FULLY_SHARD = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from lpln_autopatch import apply_low_precision_layernorm
dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{sys.argv[1]}")

def dtype_and_backward(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(4, 8))
    y.float().square().sum().backward()
    return y.dtype

cpu = dist.init_device_mesh("cpu", (1,))
norm = fully_shard(torch.nn.LayerNorm(8), mesh=cpu)
print(len(apply_low_precision_layernorm(norm)), dtype_and_backward(norm))
ddp = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)))
print(len(apply_low_precision_layernorm(ddp)), dtype_and_backward(ddp))
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down
"""


@pytest.mark.skipif(TORCH_VERSION < (2, 6), reason="fully_shard is public in torch >= 2.6")
def test_fully_sharded_and_ddp_models_are_lowered(tmp_path):
    """Surgery on what fully_shard made of a LayerNorm, and inside a DDP wrapper that exists."""
    result = run_forked("-c", FULLY_SHARD, str(tmp_path / "rendezvous"))
    assert result.stdout.split() == ["1", "torch.bfloat16"] * 2


def test_surgery_needs_no_activation():
    """Surgery lowers one model in a fresh process, and wraps nothing."""
    code = """
import torch, lpln_autopatch
original = vars(torch.nn.LayerNorm)["forward"]
norm = torch.nn.LayerNorm(8)
lpln_autopatch.apply_low_precision_layernorm(norm)
with torch.autocast("cpu", dtype=torch.bfloat16):
    print(norm(torch.randn(4, 8)).dtype)
print(vars(torch.nn.LayerNorm)["forward"] is original)
"""
    result = run_forked("-c", code)
    assert result.stdout.split() == ["torch.bfloat16", "True"]
