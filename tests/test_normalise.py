"""Values of hand-written norms in the autocast dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from hand_written_norms import (
    NORMS,
    CastingLayerNorm,
    HeadsRMSNorm,
    LayerNorm2d,
    LlamaRMSNorm,
    PermutingLayerNorm2d,
    autocast,
    by_hand,
    needs_hand_written,
    run,
)

pytestmark = needs_hand_written
BF16, FP16 = torch.bfloat16, torch.float16


def gradients(module, x, dtype, lowered):
    """y, and the gradients of x and the parameters, lowered or in float64."""
    module = copy.deepcopy(module)
    x = x.detach().clone().requires_grad_()
    if lowered:
        with by_hand(), torch.autocast("cpu", dtype=dtype):
            y = module(x)
    else:
        module, x = module.double(), x.detach().double().requires_grad_()
        y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (y * dy).sum().backward()
    return y, [x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_norm_is_lowered_with_the_values_and_gradients_of_float64(make, dtype):
    """A norm is lowered in training and evaluation mode, for float32 and autocast inputs."""
    torch.manual_seed(0)
    module = make()
    x = torch.randn(NORMS[make])
    eps = torch.finfo(dtype).eps
    for given in (x, x.to(dtype)):
        for mode in (True, False):
            y, got = gradients(module.train(mode), given, dtype, lowered=True)
            exact, expected = gradients(module, given, dtype, lowered=False)
            assert y.dtype is dtype
            torch.testing.assert_close(y.double(), exact, rtol=2 * eps, atol=2 * eps)
            for ours, theirs in zip(got, expected, strict=True):
                assert (ours.double() - theirs).norm() <= 4 * eps * theirs.norm().clamp(min=1)
    assert y.stride() == run(module, x).stride()


def test_vmap_over_parameters_keeps_strides_without_writing():
    """An image that is not batched, under weights that are."""
    module, x = LayerNorm2d(), torch.randn(2, 8, 3, 4)

    def call(weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    weights = torch.randn(3, 8)
    with by_hand(), autocast():
        y = torch.vmap(call)(weights)
        assert y.dtype is BF16
        torch.testing.assert_close(y[1], call(weights[1]))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(LlamaRMSNorm, (2, 8)), (HeadsRMSNorm, (2, 3, 4, 8)), (LayerNorm2d, (2, 8, 3, 4))],
)
def test_shapes_are_taken_and_refused_as_by_stock(make, shape):
    """Broadcasts, empty inputs, and errors, with PyTorch's own message."""
    module = make()
    for dims in ((0, *shape[1:]), (*shape[:-1], 1), (1, *shape), shape[1:], (7,), shape):
        x = torch.randn(dims)
        outcomes = [_outcome(module, x)]
        with by_hand():
            outcomes.append(_outcome(module, x))
        assert outcomes[0] == outcomes[1]


def _outcome(module, x):
    try:
        return run(module, x).shape
    except (IndexError, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("make", "shape", "memory"),
    [
        (LlamaRMSNorm, (2, 3, 4, 8), lambda x: x.transpose(1, 2)),
        (LlamaRMSNorm, (2, 3, 16), lambda x: x[..., :8]),
        (LlamaRMSNorm, (8, 3), lambda x: x.t()),
        (LayerNorm2d, (2, 8, 3, 4), lambda x: x.to(memory_format=torch.channels_last)),
        (lambda: PermutingLayerNorm2d(8), (2, 8, 3, 4), lambda x: x.clone()),
        (lambda: CastingLayerNorm(8), (2, 3, 4, 8), lambda x: x.transpose(1, 2)),
    ],
)
def test_output_has_the_strides_of_stocks(make, shape, memory):
    """The output of an input that is not contiguous has stock's strides, too."""
    module, x = make(), memory(torch.randn(shape))
    expected = run(module, x)
    with by_hand():
        y = run(module, x)
    assert y.dtype is BF16
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y.float(), expected, rtol=0.01, atol=0.01)


def test_float16_never_overflows():
    """x is not rounded first: 1e5, which float16 does not hold, is normalised in float32."""
    x = torch.randn(4, 8) * 1e5
    module = LlamaRMSNorm()
    with by_hand(), torch.autocast("cpu", dtype=FP16):
        y = module(x)
    assert y.dtype is FP16
    torch.testing.assert_close(y.float(), module(x), rtol=1e-3, atol=1e-3)


def test_nan_and_inf_come_out_where_stocks_do():
    """Rows with NaN, inf, -inf, and zeros."""
    x = torch.randn(5, 8)
    x[0, 1], x[1, 2], x[2, 3], x[3] = float("nan"), float("inf"), -float("inf"), 0
    for module in (LlamaRMSNorm(), CastingLayerNorm(8), HeadsRMSNorm(heads=1)):
        given = x if module.__class__ is not HeadsRMSNorm else x[None, None]
        expected = run(module, given)
        with by_hand():
            y = run(module, given)
        assert y.dtype is BF16
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
