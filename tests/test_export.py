"""torch.export, which crosses norms, backends and Dynamo: what a program says and gives later."""

from __future__ import annotations

import pytest
import torch
from support import run_forked

from lpln_autopatch.torch_compat import TORCH_VERSION

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
    """Where autocast has LayerNorm on its float32 list, as on CUDA: dtypes, values, metadata.

    A backend sees no tensor of the export. In a process of its own, for the list of the CPU's
    autocast is changed.
    """
    if how == "strict" and TORCH_VERSION < (2, 10):
        pytest.skip("torch < 2.10 runs its modules outside of autocast; CI runs this on later ones")
    first, seen, *rest = run_forked("-c", EXPORTED_UNDER_CUDAS_LISTS, how).stdout.splitlines()
    assert (first, seen) == ("{torch.float32}", "[]")
    assert rest == ["{torch.bfloat16} True", "[True, True, True]"] * 2
