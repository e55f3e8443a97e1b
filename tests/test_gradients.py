"""The calls that an autograd function can take, and the gradients of a LayerNorm in operators."""

from __future__ import annotations

import pytest
import torch

from lpln_autopatch.backends import gradients

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def call(dtype=FP32, weight=True):
    """Return dy, x, weight, mean and rstd of a LayerNorm over the last two dimensions."""
    x = torch.randn(5, 3, 4).to(dtype)
    scale = torch.randn(3, 4) if weight else None
    mean = x.float().mean((-2, -1), keepdim=True)
    rstd = (x.float().var((-2, -1), keepdim=True, unbiased=False) + 1e-5).rsqrt()
    return torch.randn(5, 3, 4).to(dtype), x, scale, mean, rstd


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("has_weight", [True, False])
def test_backward_gives_the_gradients_of_float64(dtype, has_weight):
    """The gradients of x, weight and bias are float32, and exact to its rounding."""
    dy, x, weight, mean, rstd = call(dtype, has_weight)
    found = gradients.backward(dy, x, (3, 4), weight, mean, rstd, [True] * 3)
    x64 = x.double().requires_grad_()
    scale = torch.ones(3, 4, dtype=torch.float64) if weight is None else weight.double()
    shift = torch.zeros(3, 4, dtype=torch.float64)
    y = torch.layer_norm(x64, (3, 4), scale.requires_grad_(), shift.requires_grad_(), 1e-5)
    exact = torch.autograd.grad(y, (x64, scale, shift), dy.double())
    for gradient, expected in zip(found, exact, strict=True):
        assert gradient.dtype is FP32
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


def test_backward_leaves_out_gradients_that_nobody_wants():
    """A gradient that is not wanted is None."""
    dy, x, weight, mean, rstd = call()
    found = gradients.backward(dy, x, (3, 4), weight, mean, rstd, [False, True, False])
    assert [gradient is None for gradient in found] == [True, False, True]


x = torch.randn(4, 8)
w = torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((x, (8,), w, w), True),
        ((x.to(BF16), [8], w, None), True),
        ((x.double(), (8,), None, None), False),
        ((x, (4,), None, None), False),
        ((x, 8, None, None), False),
        ((x, (), None, None), False),
        ((x[:0], (8,), None, None), False),
        ((x, (8,), w.double(), None), False),
        ((x, (8,), None, torch.ones(4)), False),
        ((x, (8,), w.to("meta"), None), False),
        ((x.to_sparse(), (8,), None, None), False),
        ((x.as_subclass(type("Sub", (torch.Tensor,), {})), (8,), None, None), False),
    ],
)
def test_calls_that_no_autograd_function_can_take_are_refused(arguments, expected):
    """Another dtype, layout, shape, device or class is left to native, or to PyTorch's error."""
    assert gradients.takes(*arguments) is expected


def test_inference_tensor_is_saved_only_without_gradients():
    """Autograd cannot save an inference tensor, of which stock makes a copy."""
    with torch.inference_mode():
        inference = torch.ones(2)
    assert gradients.can_be_saved(torch.ones(2))
    assert not gradients.can_be_saved(inference)
    with torch.no_grad():
        assert gradients.can_be_saved(inference)
