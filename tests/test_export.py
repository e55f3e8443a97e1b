"""torch.export, which crosses norms, backends and Dynamo: what a program says and gives later."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from support import autocast, run_forked

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import TORCH_VERSION

BF16, FP32 = torch.bfloat16, torch.float32
LayerNorm = torch.nn.LayerNorm


EXPORTED_UNDER_CUDAS_LISTS = """
import sys
import torch, torch.nn.functional as F
import lpln_autopatch as lpln
from lpln_autopatch import backends

def in_float32(x, shape, weight=None, bias=None, eps=1e-5, enable=True):
    with torch._C._DisableAutocast():
        weight = weight if weight is None else weight.float()
        bias = bias if bias is None else bias.float()
        return torch.layer_norm(x.float(), shape, weight, bias, eps)

library = torch.library.Library("aten", "IMPL")
library.impl("layer_norm", in_float32, "AutocastCPU")

def recording(x, *arguments):
    seen.append(type(x).__name__)
    return backends.native.normalise(x, *arguments)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.norm(x), F.layer_norm(x, (8,)), self.norm(x.bfloat16())

seen, model, x = [], Model(), torch.randn(4, 8)
backends._BUILT_IN["recording"] = lambda: recording
print({y.dtype for y in model(x)})
with lpln.low_precision_layernorm(backend="recording"):
    eager = model(x)
    seen.clear()
    exported = torch.export.export(model, (x,), strict=sys.argv[1] == "strict")
print(seen)
for program in (exported, exported.run_decompositions()):
    got = program.module()(x)
    metadata = [node.meta["val"].dtype for node in [*program.graph.nodes][-1].args[0]]
    print({y.dtype for y in eager}, metadata == [y.dtype for y in got])
    print([torch.equal(a, b) for a, b in zip(got, eager)])
"""


@pytest.mark.skipif(TORCH_VERSION < (2, 5), reason="torch.export of older versions differs")
@pytest.mark.parametrize("how", ["strict", "not strict"])
def test_exported_program_gives_what_the_eager_one_gave(how):
    """Dtypes, values and metadata are those of eager where autocast lists LayerNorm, as on CUDA.

    A backend sees no tensor of the export. In a process of its own, for the list of the CPU's
    autocast is changed.
    """
    if how == "strict" and TORCH_VERSION < (2, 10):
        pytest.skip("torch < 2.10 runs its modules outside of autocast; CI runs this on later ones")
    first, seen, *rest = run_forked("-c", EXPORTED_UNDER_CUDAS_LISTS, how).stdout.splitlines()
    assert (first, seen) == ("{torch.float32}", "[]")
    assert rest == ["{torch.bfloat16} True", "[True, True, True]"] * 2


class Between(torch.nn.Module):
    """Norms before a matrix, under an autocast of its own or none."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.norms = torch.nn.ModuleList([LayerNorm(8), torch.nn.GroupNorm(2, 8)])
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        with autocast() if self.own else contextlib.nullcontext():
            normalised = [norm(x) for norm in self.norms]
            return *normalised, *map(self.linear, normalised)


STRICT = pytest.mark.parametrize(
    "strict",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                TORCH_VERSION < (2, 10),
                reason="torch < 2.10 runs its modules outside of autocast; CI runs later ones",
            ),
        ),
    ],
)
needs_exports_that_say_so = pytest.mark.skipif(
    TORCH_VERSION < (2, 7), reason="torch < 2.7 does not say that it exports; CI runs later ones"
)


@needs_exports_that_say_so
@STRICT
@pytest.mark.parametrize("prepare", [lambda m: m, lpln.apply_low_precision_layernorm])
def test_program_exported_under_an_outer_autocast_runs_with_one_and_without(prepare, strict):
    """The program is stock's, and a warning says once how to export lowered norms."""
    model, x = Between(own=False), torch.randn(4, 8)

    def runs(model):
        for is_on in (True, False):
            with torch.no_grad(), autocast(enabled=is_on):
                yield from model(x)

    expected = list(runs(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lpln.NoEffectWarning)
        with low_precision_layernorm(norms="all"):
            prepare(model)
            with torch.no_grad(), autocast():
                programs = [torch.export.export(model, (x,), strict=strict) for _ in range(2)]
            for program in programs:
                got = list(runs(program.module()))
                assert [y.dtype for y in got] == [FP32, FP32, BF16, BF16, FP32, FP32, FP32, FP32]
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    (warning,) = (w for w in caught if w.category is lpln.NoEffectWarning)
    assert "enter torch.autocast in the module's forward" in str(warning.message)


@needs_exports_that_say_so
@pytest.mark.filterwarnings("error::lpln_autopatch.NoEffectWarning")
@STRICT
@pytest.mark.parametrize("outer", [False, True])
def test_program_exported_with_an_autocast_of_its_own_is_lowered(outer, strict):
    """The program is lowered under any outer autocast, on any machine."""
    model, x = Between(own=True), torch.randn(4, 8)
    with low_precision_layernorm(norms="all"), torch.no_grad(), autocast(enabled=outer):
        program = torch.export.export(model, (x,), strict=strict)
    for is_on in (True, False):
        with torch.no_grad(), autocast(enabled=is_on):
            assert [y.dtype for y in program.module()(x)] == [BF16] * 4
