"""LPLN_EXEMPT, the exemption of modules by name."""

from __future__ import annotations

import copy
import gc
import textwrap

import pytest
import torch
from support import A_ROUTE, needs_dynamo, output_dtype, run_python
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

import lpln_autopatch as lpln
from lpln_autopatch._exempt_by_name import ByName
from lpln_autopatch._torch_compat import TORCH_VERSION

pytestmark = pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="modules tell since torch 2.0")


class Head(nn.Module):
    """A norm of its own, and one that a function computes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return nn.functional.layer_norm(self.norm(x), (8,))


class Model(nn.Module):
    """Norms at several depths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "norm2": nn.LayerNorm(8)}) for _ in range(2)
        )
        self.final_norm = nn.LayerNorm(8)
        self.head = Head()


def exempt_norms(model: nn.Module) -> set[str]:
    """The LayerNorms of `model` that stay stock while a precision is active."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    with lpln.low_precision_layernorm("bf16"):
        return {name for name, norm in norms.items() if output_dtype(norm) is torch.float32}


NORMS = {"layers.0.norm", "layers.0.norm2", "layers.1.norm", "layers.1.norm2"}


@pytest.fixture
def by_name():
    """Installs the patterns that it is called with, for the test."""
    handles = []

    def install(patterns):
        names = ByName(patterns)
        handles.append(names.install())
        return names

    yield install
    for handle in handles:
        handle.close()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("final_norm", {"final_norm"}),
        ("*.final_norm, head.norm", {"final_norm", "head.norm"}),
        ("head", {"head.norm"}),
        ("layers.1.norm?", {"layers.1.norm2"}),
        ("layers.*.norm", {"layers.0.norm", "layers.1.norm"}),
        ("layers", NORMS),
        ("norm", {"layers.0.norm", "layers.1.norm", "head.norm"}),
        ("model.head.norm", set()),
        ("LayerNorm", {*NORMS, "final_norm", "head.norm"}),
        ("Head", {"head.norm"}),
        ("Model.final_norm", {"final_norm"}),
        ("Head.norm, ModuleDict.norm2", {"head.norm", "layers.0.norm2", "layers.1.norm2"}),
        ("layers.1.LayerNorm", {"layers.1.norm", "layers.1.norm2"}),
        ("Mode*", set()),
        (", ,", set()),
    ],
)
def test_patterns_match_the_ends_of_names(by_name, patterns, expected):
    """Each component by the rules of file names, or the name of a class or of a base of it.

    Whatever is inside a module that matches is exempt, too.
    """
    by_name(patterns)
    model = Model()
    assert exempt_norms(model) == expected
    assert exempt_norms(copy.deepcopy(model)) == expected


def test_names_are_known_in_whatever_order_a_model_is_put_together(by_name):
    """A norm that gets its place, or its full name, late; one that is added to what matched."""
    by_name("model.head.norm, added")
    outer, model = nn.Module(), Model()
    outer.model = model
    assert exempt_norms(outer) == {"model.head.norm"}
    model.head.norm = nn.LayerNorm(8)
    assert exempt_norms(outer) == {"model.head.norm"}
    outer.added = nn.ModuleList()
    outer.added.append(nn.LayerNorm(8))
    assert exempt_norms(outer) == {"model.head.norm", "added.0"}
    lpln.exempt(outer, exempt=False)
    assert exempt_norms(outer) == set()


def test_outermost_module_is_named_by_its_class(by_name):
    """The outermost module has its class for a name from its first submodule on, and is stock."""
    by_name("Head")
    with lpln.low_precision_layernorm("bf16"):
        assert output_dtype(Head()) is torch.float32


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "checkpoint_wrapper": checkpoint_wrapper.checkpoint_wrapper,
    "data parallel": nn.DataParallel,
    "twice": lambda m: nn.DataParallel(checkpoint_wrapper.checkpoint_wrapper(m)),
}


@needs_dynamo
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_left_out_of_names(by_name, wrap):
    """Names lack the wrappers of torch.compile, checkpoint_wrapper, DDP and FSDP 1."""
    by_name("outer.head.norm")
    outer = nn.Module()
    outer.head = wrap(Head())
    model = nn.Module()
    model.outer = wrap(outer)
    (name,) = exempt_norms(model)
    assert name.endswith("norm")


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_module_that_is_inserted_into_an_exempt_container_is_exempt(by_name, container):
    """An inserted module is exempt, as an appended one is."""
    by_name("blocks")
    model = nn.Module()
    model.blocks = container()
    model.blocks.append(nn.LayerNorm(8))
    model.blocks.insert(0, nn.LayerNorm(8))
    model.others = container()
    model.others.insert(0, nn.LayerNorm(8))
    assert exempt_norms(model) == {"blocks.0", "blocks.1"}


def test_mark_that_was_taken_off_by_hand_stays_off(by_name):
    """The mark stays off in any parent and in copies, until the module is exempted by hand."""
    by_name("head")
    model, outer = Model(), nn.Module()
    lpln.exempt(model.head.norm, False)
    outer.module = model
    outer.head = copy.deepcopy(model.head)
    assert exempt_norms(outer) == set()
    lpln.exempt(outer.module)
    assert "module.head.norm" in exempt_norms(outer)


def test_registering_again_keeps_nothing_more(by_name):
    """A forward that sets a submodule at each call."""
    names = by_name("head.norm")
    outer, inner = nn.Module(), nn.LayerNorm(8)
    for _ in range(3):
        outer.inner = inner
    assert [len(parents) for parents in names._parents.values()] == [1]


def test_modules_are_not_kept(by_name):
    """A module is freed with all that is known of it."""
    names = by_name("head.norm")
    model = Model()
    assert len(names._parents) > 0
    del model
    gc.collect()
    assert len(names._parents) == 0


@needs_dynamo
@pytest.mark.parametrize("patterns", ["*.final_norm,head", ""])
def test_variable_exempts_in_an_unchanged_program(patterns):
    """Functions that an exempt module calls included; eager and compiled."""
    code = """
        import sys
        sys.path.insert(0, ".")
        import torch
        from test_exempt_by_name import Model

        model, x = Model(), torch.randn(4, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for run in (model.final_norm, model.head, model.layers[0]["norm"]):
                print(run(x).dtype, torch.compile(run, backend="eager", fullgraph=True)(x).dtype)
    """
    result = run_python(
        "-c", textwrap.dedent(code), LPLN_PRECISION="amp", LPLN_EXEMPT=patterns, **A_ROUTE
    )
    exempt = "torch.float32 torch.float32" if patterns else "torch.bfloat16 torch.bfloat16"
    assert result.stdout.splitlines() == [exempt] * 2 + ["torch.bfloat16 torch.bfloat16"]
