"""report(model): the verdicts, each beside the dtype that the module really gives."""

from __future__ import annotations

import dataclasses
import functools
import gc
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
import wrapt
from support import needs_dynamo, output_dtype, run_python

import lpln_autopatch
from lpln_autopatch import LPLayerNorm, low_precision_layernorm, report
from lpln_autopatch.torch_compat import TORCH_VERSION
from lpln_autopatch.verdicts import Verdict


class Inherits(torch.nn.LayerNorm):
    """No forward of its own."""


class CallsSuper(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x)


class CallsSuperInAMethod(torch.nn.LayerNorm):
    def forward(self, x):
        return self.normalise(x)

    def normalise(self, x):
        return super().forward(x)


class CallsByName(torch.nn.LayerNorm):
    def forward(self, x):
        return torch.nn.LayerNorm.forward(self, x)


def run_torchs(module, x):
    return torch.nn.LayerNorm.forward(module, x)


class CallsAHelper(torch.nn.LayerNorm):
    def forward(self, x):
        return run_torchs(self, x)


class CallsAStaticMethod(torch.nn.LayerNorm):
    def forward(self, x):
        return self.normalise(self, x)

    normalise = staticmethod(run_torchs)


class CallsAProperty(torch.nn.LayerNorm):
    def forward(self, x):
        return self.normalise(x)

    @property
    def normalise(self):
        return super().forward


class CallsADecoratedMethod(torch.nn.LayerNorm):
    def forward(self, x):
        return self.normalise(x)

    @torch.no_grad()
    def normalise(self, x):
        return super().forward(x)


class CallsByGetattr(torch.nn.LayerNorm):
    def forward(self, x):
        return getattr(super(), "for" + "ward")(x)


class CallsFromATable(torch.nn.LayerNorm):
    def forward(self, x):
        return TABLE["torch"](self, x)


TABLE = {"torch": run_torchs}


class CallsTwoHelpers(torch.nn.LayerNorm):
    """The second is further away than the report looks."""

    def forward(self, x):
        return run_helper(self, x)


def run_helper(module, x):
    return run_torchs(module, x)


class Imports(torch.nn.LayerNorm):
    def forward(self, x):
        from test_reporting import run_torchs as helper

        return helper(self, x)


class Delegates(torch.nn.LayerNorm):
    """Another LayerNorm inside does the work."""

    def __init__(self, size):
        super().__init__(size)
        self.inner = torch.nn.LayerNorm(size)

    def forward(self, x):
        return self.inner(x)


class Computes(torch.nn.LayerNorm):
    """By itself, with functions of torch and Python, a method, and super() of that."""

    def forward(self, x):
        return self.centred(x) * self.weight + float(len(self.normalized_shape) - 1)

    def centred(self, x):
        super().extra_repr()
        return x - torch.mean(x, dim=-1, keepdim=True)


class Negated(torch.autograd.Function):
    """Stands for the kernel of another library."""

    @staticmethod
    def forward(ctx, x):
        return -x


class HasAKernel(torch.nn.LayerNorm):
    def forward(self, x):
        return Negated.apply(x)


class HasACall(torch.nn.LayerNorm):
    def __call__(self, x):
        return super().__call__(x)


class HasACallImpl(torch.nn.LayerNorm):
    def _call_impl(self, x):
        return self.forward(x)


class MyNorm(torch.nn.Module):
    """No LayerNorm, and runs its forward."""

    normalized_shape, weight, bias, eps = (8,), None, None, 1e-5

    def forward(self, x):
        return torch.nn.LayerNorm.forward(self, x)


class Overrides(torch.nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class InheritsOverride(Overrides):
    pass


class BoundEarly(torch.nn.LayerNorm):
    forward = torch.nn.LayerNorm.forward


class Block(torch.nn.Module):
    """Not called a norm; calls F.layer_norm."""

    def forward(self, x):
        return self.normalise(x)

    def normalise(self, x):
        return torch.nn.functional.layer_norm(x, (8,))


class MyRMSNorm(torch.nn.Module):
    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt()


class PreNorm(torch.nn.Module):
    """Called a norm, and has one inside, by the name of torch's function."""

    def __init__(self):
        super().__init__()
        self.layer_norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        return F.gelu(self.layer_norm(x))


class GN(torch.nn.GroupNorm):
    pass


def with_instance_forward(forward):
    """A LayerNorm that carries what `forward` makes of it."""
    module = torch.nn.LayerNorm(8)
    module.forward = forward(module)
    return module


def hooked():
    """A LayerNorm hooked as accelerate.hooks.add_hook_to_module does it."""

    def new_forward(module, *args):
        return module._old_forward(*args)

    module = torch.nn.LayerNorm(8)
    module._hf_hook, module._old_forward = object(), module.forward
    partial = functools.partial(new_forward, module)
    module.forward = functools.update_wrapper(partial, module._old_forward)
    return module


def parametrized():
    """A LayerNorm whose class torch.nn.utils.parametrize has swapped."""
    module = torch.nn.LayerNorm(8)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Identity())
    return module


def under_surgery():
    """A LayerNorm that surgery has lowered."""
    module = torch.nn.LayerNorm(8)
    lpln_autopatch.apply_low_precision_layernorm(module)
    return module


def liger(module):
    """What Liger-Kernel puts on an instance: the method of another class."""
    return types.MethodType(Overrides.forward, module)


MODULES = {
    "LayerNorm": (lambda: torch.nn.LayerNorm(8), Verdict.LOWERED),
    "no parameters": (lambda: torch.nn.LayerNorm(8, elementwise_affine=False), Verdict.LOWERED),
    "inherits": (lambda: Inherits(8), Verdict.LOWERED),
    "parametrized": (parametrized, Verdict.LOWERED),
    "bound early": (lambda: BoundEarly(8), Verdict.OVERRIDES),
    "overrides": (lambda: Overrides(8), Verdict.OVERRIDES),
    "inherits override": (lambda: InheritsOverride(8), Verdict.OVERRIDES),
    "Liger": (lambda: with_instance_forward(liger), Verdict.INSTANCE),
    "bound method": (lambda: with_instance_forward(lambda m: m.forward), Verdict.INSTANCE),
    "accelerate": (hooked, Verdict.INSTANCE),
    "exempt": (lambda: lpln_autopatch.exempt(torch.nn.LayerNorm(8)), Verdict.EXEMPT),
    "exempt, calls super": (lambda: lpln_autopatch.exempt(CallsSuper(8)), Verdict.EXEMPT),
    "float64": (lambda: torch.nn.LayerNorm(8).double(), Verdict.STOCK),
    "TorchScript": (lambda: torch.jit.script(torch.nn.LayerNorm(8)), Verdict.STOCK),
    "never engages": (lambda: LPLayerNorm(8, precision="fp32"), Verdict.STOCK),
    "block": (Block, Verdict.OTHER),
    "RMSNorm by name": (MyRMSNorm, Verdict.OTHER),
    "GroupNorm": (lambda: torch.nn.GroupNorm(2, 8), Verdict.OTHER),
    "of a GroupNorm": (lambda: GN(2, 8), Verdict.OTHER),
    "BatchNorm": (lambda: torch.nn.BatchNorm1d(8), Verdict.OTHER),
    "surgery": (under_surgery, Verdict.SURGERY),
    "surgery, hooked after": (lambda: hook_after_surgery(), Verdict.SURGERY),
    "calls super": (lambda: CallsSuper(8), Verdict.MAYBE),
    "calls super in a method": (lambda: CallsSuperInAMethod(8), Verdict.MAYBE),
    "calls by name": (lambda: CallsByName(8), Verdict.MAYBE),
    "calls a helper": (lambda: CallsAHelper(8), Verdict.MAYBE),
    "calls a static method": (lambda: CallsAStaticMethod(8), Verdict.MAYBE),
    "calls a property": (lambda: CallsAProperty(8), Verdict.MAYBE),
    "calls a decorated method": (lambda: CallsADecoratedMethod(8), Verdict.MAYBE),
    "calls by getattr": (lambda: CallsByGetattr(8), Verdict.MAYBE),
    "calls from a table": (lambda: CallsFromATable(8), Verdict.MAYBE),
    "calls two helpers": (lambda: CallsTwoHelpers(8), Verdict.MAYBE),
    "imports": (lambda: Imports(8), Verdict.MAYBE),
    "computes": (lambda: Computes(8), Verdict.OVERRIDES),
    "has a kernel": (lambda: HasAKernel(8), Verdict.OVERRIDES),
    "calls, and is none": (MyNorm, Verdict.MAYBE),
    "has a __call__": (lambda: HasACall(8), Verdict.MAYBE),
    "has a _call_impl": (lambda: HasACallImpl(8), Verdict.MAYBE),
}


def hook_after_surgery():
    """The hook calls what was the forward when it came: surgery's."""
    module = under_surgery()
    module.forward = module.forward
    return module


def test_norm_inside_a_layernorm_may_be_its_forward():
    """A subclass that lets another module do the work may be lowered: it is, if that one is."""
    module = Delegates(8)
    assert [row.verdict for row in report(module).rows] == [Verdict.MAYBE, Verdict.LOWERED]
    with low_precision_layernorm("amp"):
        assert output_dtype(module) is torch.bfloat16


def test_forward_taken_from_us_by_a_class_that_is_no_layernorm():
    """A class called a norm that took LayerNorm.forward while it was ours may be lowered."""
    with low_precision_layernorm("amp"):
        taken = type("MyNorm", (MyNorm,), {"forward": torch.nn.LayerNorm.forward})
        (row,) = report(taken()).rows
        assert row.verdict is Verdict.MAYBE
        assert output_dtype(taken()) is torch.bfloat16


def test_hook_that_keeps_surgery_beyond_its_reversal():
    """What a hook took from surgery is LayerNorm.forward once that is reverted."""
    module = hook_after_surgery()
    lpln_autopatch.revert_low_precision_layernorm(module)
    (row,) = report(module).rows
    assert row.verdict is Verdict.LOWERED
    with low_precision_layernorm("amp"):
        assert output_dtype(module) is torch.bfloat16


@pytest.mark.filterwarnings("ignore::lpln_autopatch.NoEffectWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "verdict"), MODULES.values(), ids=MODULES)
def test_verdict_is_what_happens(make, verdict):
    """The verdict, before the activation and during it, and the dtype that comes out then."""
    module = make()
    (row,) = report(module).rows
    assert (row.name, row.module_class, row.verdict) == ("", type(module), verdict)
    dtype = torch.float64 if row.reason.startswith("float64") else torch.float32
    x = torch.randn(4, 8, dtype=dtype)
    with low_precision_layernorm("amp"):
        assert report(module).rows == (row,)
        lowered = output_dtype(module, x) is torch.bfloat16
    assert lowered is (row.verdict.covered or verdict is Verdict.MAYBE)


@pytest.mark.parametrize(
    ("make", "verdict"),
    [
        (hooked, Verdict.LOWERED),
        (lambda: with_instance_forward(lambda m: m.forward), Verdict.LOWERED),
        (lambda: with_instance_forward(lambda m: functools.wraps(m.forward)(lambda x: x)), "maybe"),
    ],
)
def test_forward_that_was_taken_from_us_is_ours(make, verdict):
    """What an instance took from its class while the wrapper was on is lowered, or may be."""
    with low_precision_layernorm("amp"):
        (row,) = report(module := make()).rows
        if verdict == "maybe":
            assert row.verdict is Verdict.MAYBE
        else:
            assert row.verdict is verdict
            assert output_dtype(module) is torch.bfloat16


def test_report_counts_and_names_in_the_models_order():
    """Containers are no rows, a shared module is one row with all its names, and one line sums up.

    A module called a norm that has its norm inside is not one; weight_norm is one of parameters.
    """
    shared = torch.nn.LayerNorm(8)
    model = torch.nn.Sequential(
        PreNorm(), shared, torch.nn.Linear(8, 8), CallsSuper(8), torch.nn.Sequential(shared)
    )
    if TORCH_VERSION >= (2, 0):
        torch.nn.utils.parametrizations.weight_norm(model[2])
    found = report(model)
    assert [(row.name, row.other_names) for row in found.rows] == [
        ("0.layer_norm", ()),
        ("1", ("4.0",)),
        ("3", ()),
    ]
    assert found.summary == "2 of 3 norm-like modules are covered, 1 more may be."
    assert report(torch.nn.Linear(8, 8)).summary == "0 of 0 norm-like modules are covered."


def test_modules_in_a_cycle_are_reported_once():
    """A module that holds its parent does not keep the report from ending."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    model[0].parent = model
    (row,) = report(model).rows
    assert row.name == "0"


@dataclasses.dataclass
class Unhashable:
    """Stands for a function, as functools.update_wrapper makes it; equal to others by value."""

    def __call__(self, x):
        return x


class Raises:
    """Answers no question about its attributes."""

    def __getattr__(self, name):
        raise RuntimeError(f"no {name}")


class RaisingModule(torch.nn.LayerNorm):
    def __getattr__(self, name):
        raise RuntimeError(f"no {name}")


def raising_module():
    module = torch.nn.LayerNorm(8)
    module.__class__ = RaisingModule
    return module


def wraps_itself(module):
    def forward(x):
        return x

    forward.__wrapped__ = forward
    return forward


@pytest.mark.parametrize(
    ("make", "verdict", "reason"),
    [
        (
            lambda: with_instance_forward(
                lambda m: functools.update_wrapper(Unhashable(), type(m).forward)
            ),
            Verdict.MAYBE,
            "no Python code",
        ),
        (lambda: with_instance_forward(wraps_itself), Verdict.INSTANCE, "in place of"),
        (lambda: with_instance_forward(lambda m: None), Verdict.MAYBE, "no Python code"),
        (lambda: with_instance_forward(lambda m: Raises()), Verdict.MAYBE, "RuntimeError: no "),
        (raising_module, Verdict.LOWERED, ""),
    ],
)
def test_odd_module_does_not_take_the_report_down(make, verdict, reason):
    """An odd forward has its row, naming the error if there was one; the others have theirs."""
    odd, after = report(torch.nn.Sequential(make(), torch.nn.LayerNorm(8))).rows
    assert odd.verdict is verdict
    assert reason in odd.reason
    assert after.verdict is Verdict.LOWERED


def test_report_keeps_no_model_alive():
    """What the closure of a forward holds dies with the model."""
    module = torch.nn.LayerNorm(8)
    module.forward = (lambda module: lambda x: module.weight * x)(module)
    report(module)
    weight = weakref.ref(module.weight)
    del module
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("name", ["EnormousHead", "NormPenaltyLoss", "Normalize", "NormalMLP"])
def test_word_that_is_no_norm_is_no_row(name):
    """ "Norm" inside another word, and a loss, name no norm."""
    assert report(type(name, (torch.nn.Identity,), {})()).rows == ()


@pytest.mark.parametrize("name", ["T5LayerNorm", "RmsNorm2d", "Layernorm", "my_norm", "NormAct"])
def test_word_that_is_a_norm_is_a_row(name):
    """In CamelCase, with underscores, and the usual names in any case."""
    (row,) = report(type(name, (torch.nn.Identity,), {})()).rows
    assert row.verdict is Verdict.OTHER


def test_mark_of_a_class_is_no_exemption():
    """exempt() marks instances, and eager mode looks at those alone; so does the report."""
    module = type("Marked", (torch.nn.LayerNorm,), {"_lpln_autopatch_exempt": True})(8)
    assert report(module).rows[0].verdict is Verdict.LOWERED
    with low_precision_layernorm("amp"):
        assert output_dtype(module) is torch.bfloat16


def test_many_names_are_a_short_column():
    """A module that is shared widely has three of its names in the table, and how many more."""
    shared = torch.nn.LayerNorm(8)
    found = report(torch.nn.Sequential(*[shared] * 2000))
    assert str(found).splitlines()[1].startswith("0 = 1 = 2 +1997  LayerNorm")
    assert len(found.rows[0].other_names) == 1999


def test_report_prints_as_a_table():
    """A line for each module, then the count, then what is in force."""
    model = torch.nn.ModuleDict({"first": torch.nn.LayerNorm(8), "rms": MyRMSNorm()})
    assert str(report(model)).splitlines() == [
        "name   class      verdict          reason",
        "first  LayerNorm  lowered          runs LayerNorm.forward",
        "rms    MyRMSNorm  not a LayerNorm  MyRMSNorm does not run LayerNorm.forward",
        "",
        "1 of 2 norm-like modules are covered.",
        "No precision is active: until one is, nothing is lowered but by surgery.",
    ]


@pytest.mark.filterwarnings("ignore::lpln_autopatch.NoEffectWarning")
@pytest.mark.parametrize(
    ("precision", "effect"),
    [
        ("amp", "It lowers under autocast to torch.float16 or torch.bfloat16."),
        ("bf16", "It lowers under autocast to torch.bfloat16."),
        ("fp32", "It never engages: nothing is lowered but by surgery."),
    ],
)
def test_report_says_what_is_in_force(layer_norm, precision, effect):
    """The last line has precision, backend, source, and when that lowers."""
    lpln_autopatch.enable(precision)
    name = lpln_autopatch.status().precision
    assert report(layer_norm).in_force == f"Active: {name}, backend native, from enable. {effect}"


def test_report_neither_runs_nor_patches(layer_norm):
    """The model is looked at: no hook of it is called, and LayerNorm.forward stays."""
    original = vars(torch.nn.LayerNorm)["forward"]
    layer_norm.register_forward_pre_hook(lambda *_: pytest.fail("was run"))
    report(layer_norm)
    assert vars(torch.nn.LayerNorm)["forward"] is original


def test_patcher_that_hides_us_is_reported(layer_norm, monkeypatch):
    """While a precision is active and somebody's forward is in our place: no promise."""
    original = vars(torch.nn.LayerNorm)["forward"]
    with low_precision_layernorm("amp"):
        with monkeypatch.context() as context:
            context.setattr(torch.nn.LayerNorm, "forward", original)
            assert report(layer_norm).rows[0].verdict is Verdict.MAYBE
            assert output_dtype(layer_norm) is torch.float32
        assert report(layer_norm).rows[0].verdict is Verdict.LOWERED


def replaces(ours):
    return functools.wraps(ours)(lambda self, x: x.float())


def casts(ours):
    def forward(self, x):
        return ours(self, x).float()

    return forward


@pytest.mark.parametrize(
    "above", [replaces, casts, lambda ours: wrapt.FunctionWrapper(ours, cast_what_it_gives)]
)
def test_patcher_above_us_is_reported(layer_norm, monkeypatch, above):
    """A forward above ours may change what ours gives, or never call it: no promise."""
    with low_precision_layernorm("amp"):
        with monkeypatch.context() as context:
            patched = above(vars(torch.nn.LayerNorm)["forward"])
            context.setattr(torch.nn.LayerNorm, "forward", patched)
            (row,) = report(layer_norm).rows
            assert (row.verdict, "above ours" in row.reason) == (Verdict.MAYBE, True)
            layer_norm.forward = layer_norm.forward
            assert report(layer_norm).rows[0].verdict is Verdict.MAYBE
            del layer_norm.forward
            assert output_dtype(layer_norm) is torch.float32
        assert report(layer_norm).rows[0].verdict is Verdict.LOWERED


def cast_what_it_gives(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs).float()


@needs_dynamo
def test_compiled_model_is_looked_into(layer_norm):
    """An OptimizedModule is no row; what it compiled is, under the name that it has there."""
    compiled = torch.compile(torch.nn.Sequential(layer_norm, Overrides(8)))
    rows = {row.name: row.verdict for row in report(compiled).rows}
    assert rows == {"_orig_mod.0": Verdict.LOWERED, "_orig_mod.1": Verdict.OVERRIDES}
    assert [row.name for row in report(torch.compile(layer_norm)).rows] == ["_orig_mod"]


@pytest.mark.skipif(TORCH_VERSION < (2, 4), reason="torch.nn.RMSNorm is newer; CI runs it there")
def test_rms_norm_is_reported():
    """torch's own RMSNorm is a row, and not lowered."""
    (row,) = report(torch.nn.RMSNorm(8)).rows
    assert row.verdict is Verdict.OTHER


DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from lpln_autopatch import report, enable
dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{sys.argv[1]}")
enable()

def model():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))

for wrapped in (
    fully_shard(torch.nn.LayerNorm(8)),
    DistributedDataParallel(model()),
    FullyShardedDataParallel(model(), device_id=torch.device("cpu")),
):
    (row,) = report(wrapped).rows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        print(row.name or "-", row.verdict, wrapped(torch.randn(4, 8)).dtype)
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down
"""


@pytest.mark.skipif(TORCH_VERSION < (2, 6), reason="fully_shard is public in torch >= 2.6")
def test_sharded_and_wrapped_models(tmp_path):
    """The class that fully_shard makes, and what is inside DDP and FSDP, is lowered and said so."""
    result = run_python("-c", DISTRIBUTED, str(tmp_path / "rendezvous"))
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["-", "lowered", "torch.bfloat16"],
        ["module.1", "lowered", "torch.bfloat16"],
        ["_fsdp_wrapped_module.1", "lowered", "torch.bfloat16"],
    ]


def test_report_refuses_what_is_no_module():
    """report() of a state_dict is a TypeError that says what it takes."""
    with pytest.raises(
        TypeError, match=r"takes a torch\.nn\.Module, not <class 'collections\.OrderedDict'>\.$"
    ):
        report(torch.nn.LayerNorm(8).state_dict())
