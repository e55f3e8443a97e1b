"""Error against float64, beside Composer's recipe, over a range of shapes and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import AUTOCAST_DTYPES, autocast

import lpln_autopatch
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import TORCH_VERSION
from lpln_autopatch.bench.recipe import ComposerRecipe

# Two float32 computations differ in their last bits, by this beside the terms of a sum ...
NOISE = 2e-4
# ... and by some of these beside x / std, of which the mean / std is taken.
EPS = torch.finfo(torch.float32).eps

inputs = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "rows": st.sampled_from([1, 2, 7, 64, 300]),
        "shape": st.sampled_from([(2,), (3,), (8,), (33,), (256,), (4, 5), (2, 3, 4), (1024,)]),
        "mean": st.sampled_from([0.0, 1.0, 64.0]),
        "scale": st.sampled_from([0.01, 1.0, 100.0]),
        "input_dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "autocast_dtype": st.sampled_from(AUTOCAST_DTYPES),
        "affine": st.booleans(),
    }
)


def run(
    module: torch.nn.LayerNorm, x: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Output and gradients of all that has one, in float64."""
    x = x.detach().requires_grad_()
    with autocast(dtype) if dtype else torch.enable_grad():
        y = module(x)
    wanted = {"x": x, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(y, list(wanted.values()), upstream.to(y.dtype))
    assert [g.dtype for g in gradients] == [t.dtype for t in wanted.values()]
    return {
        "y": y.detach().double(),
        **{k: g.double() for k, g in zip(wanted, gradients, strict=True)},
    }


@pytest.mark.skipif(TORCH_VERSION < (2, 2), reason="the recipe's CPU kernels are in torch >= 2.2")
@settings(max_examples=200, deadline=None)
@given(inputs)
def test_error_is_not_above_composers(case):
    """Output and every gradient are at least as close to float64 as Composer's recipe."""
    torch.manual_seed(case["seed"])
    shape, dtype = case["shape"], case["autocast_dtype"]
    module = torch.nn.LayerNorm(shape, elementwise_affine=case["affine"])
    composer = ComposerRecipe(shape, elementwise_affine=case["affine"])
    reference = torch.nn.LayerNorm(shape, elementwise_affine=case["affine"]).double()
    if case["affine"]:
        torch.nn.init.normal_(module.weight, 1.0, 0.5)
        torch.nn.init.normal_(module.bias)
    composer.load_state_dict(module.state_dict())
    reference.load_state_dict(module.state_dict())
    x = (torch.randn(case["rows"], *shape) * case["scale"] + case["mean"]).to(case["input_dtype"])
    upstream = torch.randn(x.shape).to(dtype)

    exact = run(reference, x.double(), upstream, None)
    theirs = run(composer, x, upstream, dtype)
    with low_precision_layernorm():
        ours = run(module, x, upstream, dtype)
    lpln_autopatch.disable()
    noise = float32_noise(reference, x.double(), upstream.double())
    for name, value in exact.items():
        error, allowed = ((result[name] - value).norm() for result in (ours, theirs))
        assert error <= 1.02 * allowed + noise[name], (name, error, allowed)


def float32_noise(
    module: torch.nn.LayerNorm, x: torch.Tensor, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the relative errors of the output and of each gradient in float32 itself."""
    dims = tuple(range(-len(module.normalized_shape), 0))
    weight = module.weight.detach() if module.elementwise_affine else torch.ones(())
    rstd = (x.var(dims, unbiased=False, keepdim=True) + module.eps).rsqrt()
    normalised = NOISE + 4 * EPS * x.abs() * rstd
    upstream = upstream.abs()
    return {
        "y": (weight.abs() * normalised).norm(),
        "x": ((upstream * weight.abs()).amax(dims, keepdim=True) * rstd * normalised).norm(),
        "weight": (upstream * normalised).sum(0).norm(),
        "bias": NOISE * upstream.sum(0).norm(),
    }


def test_error_is_that_of_rounding_once():
    """256x1024 in float32: the output's error is the stock output's, rounded to bfloat16."""
    torch.manual_seed(0)
    module = torch.nn.LayerNorm(1024)
    torch.nn.init.normal_(module.weight, 1.0, 0.2)
    x = torch.randn(256, 1024)
    exact = torch.nn.functional.layer_norm(
        x.double(), (1024,), module.weight.double(), module.bias.double()
    )
    with low_precision_layernorm(), autocast():
        lowered = module(x)
    error = (lowered - exact).norm() / exact.norm()
    rounded_once = (exact.to(torch.bfloat16) - exact).norm() / exact.norm()
    assert error <= 1.001 * rounded_once
    assert 0.001 < rounded_once < 0.002
