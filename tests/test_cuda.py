"""The promises on a real GPU. Everything that does not need one is tested on CPU elsewhere."""

from __future__ import annotations

import json

import pytest
import torch
from support import needs_gpu, run_python
from torch.utils.checkpoint import checkpoint

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch.bench.recipe import ComposerRecipe

# test_native.py covers the path that CUDA takes without one.
pytestmark = needs_gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
each_dtype = pytest.mark.parametrize("dtype", [BF16, FP16])


def run(module, x, upstream, dtype) -> list[torch.Tensor]:
    """Output and gradients of x and the parameters, under CUDA autocast to `dtype`."""
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], upstream.to(y.dtype))]


def layer_norms(features: int) -> tuple[torch.nn.LayerNorm, ComposerRecipe, torch.nn.LayerNorm]:
    """Return a LayerNorm, Composer's recipe and the float64 reference, with the same parameters."""
    ours = torch.nn.LayerNorm(features, device="cuda")
    torch.nn.init.normal_(ours.weight, 1.0, 0.2)
    composer = ComposerRecipe(features, device="cuda")
    exact = torch.nn.LayerNorm(features, device="cuda", dtype=torch.float64)
    for module in (composer, exact):
        module.load_state_dict(ours.state_dict())
    return ours, composer, exact


@each_dtype
def test_stock_is_forced_to_float32(dtype):
    """The premise of the package: autocast on CUDA gives float32."""
    ours, _, _ = layer_norms(64)
    x = torch.randn(8, 64, device="cuda", dtype=dtype)
    assert run(ours, x, x, dtype)[0].dtype is FP32


@each_dtype
@pytest.mark.parametrize("input_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("compiled", [False, True])
def test_error_is_not_above_composers(dtype, input_dtype, compiled):
    """Eager and compiled: the autocast dtype, and an error no larger than the recipe's."""
    ours, composer, exact = layer_norms(1024)
    x = torch.randn(4096, 1024, device="cuda").to(input_dtype)
    upstream = torch.randn(4096, 1024, device="cuda").to(dtype)
    theirs = run(composer, x, upstream, dtype)
    with low_precision_layernorm():
        got = run(torch.compile(ours, fullgraph=True) if compiled else ours, x, upstream, dtype)
    assert [t.dtype for t in got] == [dtype, input_dtype, FP32, FP32]
    for g, t, e in zip(got, theirs, run(exact, x.double(), upstream, None), strict=True):
        error, allowed = ((value.double() - e).norm() / e.norm() for value in (g, t))
        assert error <= 1.02 * allowed + 1e-5


def kernels(call, *args) -> list[str]:
    """The names of the kernels that a call launches, after one that is not counted."""
    call(*args)
    with torch.profiler.profile() as profile:
        call(*args)
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if "CUDA" in str(e.device_type)]


@each_dtype
def test_kernels_of_a_call(dtype):
    """A call with x in the autocast dtype launches no more kernels than Composer's recipe."""
    ours, composer, _ = layer_norms(1024)
    x = torch.randn(4096, 1024, device="cuda", dtype=dtype)
    with torch.autocast("cuda", dtype=dtype):
        theirs = kernels(composer, x)
        with low_precision_layernorm():
            assert 1 <= len(kernels(ours, x)) <= len(theirs)


@each_dtype
def test_compiled_call_is_one_kernel(dtype):
    """Inductor fuses the upcast, the norm and the downcast."""
    ours, _, _ = layer_norms(1024)
    compiled = torch.compile(ours, fullgraph=True)
    x = torch.randn(4096, 1024, device="cuda", dtype=dtype)
    with low_precision_layernorm(), torch.no_grad(), torch.autocast("cuda", dtype=dtype):
        names = kernels(compiled, x)
    assert len(names) == 1, names


@each_dtype
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_after_the_block_recomputes_lowered(dtype, use_reentrant):
    """Checkpointed gradients equal those without checkpointing, on autograd's device thread."""
    ours, _, _ = layer_norms(1024)
    x = torch.randn(64, 1024, device="cuda", dtype=dtype)
    with low_precision_layernorm():
        expected = run(ours, x, x, dtype)
    x = x.requires_grad_()
    with low_precision_layernorm(), torch.autocast("cuda", dtype=dtype):
        y = checkpoint(ours, x, use_reentrant=use_reentrant)
    lpln.disable()
    y.backward(x.detach().to(y.dtype))
    for got, e in zip([y, x.grad, ours.weight.grad, ours.bias.grad], expected, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)


@each_dtype
def test_memory_is_not_above_composers(dtype):
    """Ten norms in a row, forward and backward: the peak is not above the recipe's."""

    def peak(cls, lower: bool) -> int:
        model = torch.nn.Sequential(*(cls(1024, device="cuda") for _ in range(10)))
        x = torch.randn(8192, 1024, device="cuda", dtype=dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with low_precision_layernorm("amp"), low_precision_layernorm("amp" if lower else "fp32"):
            run(model, x, x, dtype)
        return torch.cuda.max_memory_allocated() - before

    assert peak(torch.nn.LayerNorm, True) <= peak(ComposerRecipe, False)


@pytest.mark.parametrize("suite", ["call", "loss"])
def test_suite_measures_on_cuda(suite, tmp_path):
    """The suites that run on a device have figures of lowered calls there."""
    file = tmp_path / "figures.json"
    command = ["-m", "lpln_autopatch", "bench", suite, "--device", "cuda", "--quick"]
    run_python(*command, "--json", str(file), timeout=600)
    rows = json.loads(file.read_text())["suites"][suite]
    lowered = [row for row in rows if row["contender"] in ("lowered (native)", "lowered")]
    assert lowered
    for row in lowered:
        assert row["reason"] is None
        assert {"call": "/ stock", "loss": "final loss"}[suite] in row["figures"]
