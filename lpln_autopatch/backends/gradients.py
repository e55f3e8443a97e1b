"""The calls that an autograd function can take, and LayerNorm's gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpln_autopatch._torch_compat import forward_mode_is_on, never_a_frame_of_its_own
from lpln_autopatch.backends.protocol import Affine, Shape

PLAIN = frozenset({Tensor, torch.nn.Parameter})
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

operator = torch.ops.aten.native_layer_norm_backward.default


def takes(x: Tensor, shape: Shape, weight: Affine, bias: Affine) -> bool:
    """Return True if an autograd function can take this call; native takes every one."""
    # This runs in each call. Loops take a third of the time of generators.
    if not (
        type(x) in PLAIN
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and not x.is_nested
        # Native raises PyTorch's own error for an integer, for another shape and for none.
        and isinstance(shape, (tuple, list))
        and len(shape) > 0
        and x.shape[-len(shape) :] == (shape := tuple(shape))
        and x.numel() > 0
        # An autograd function has no formula for these two.
        and not torch._C._are_functorch_transforms_active()
        and not forward_mode_is_on()
    ):
        return False
    for parameter in (weight, bias):
        if parameter is not None and not (
            type(parameter) in PLAIN
            and parameter.dtype in DTYPES
            and parameter.shape == shape
            and parameter.device == x.device
        ):
            return False
    return True


def can_be_saved(x: Tensor) -> bool:
    """Return True if autograd can save `x`. It saves no inference tensor; stock makes a copy."""
    return not (x.is_inference() and torch.is_grad_enabled())


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return True if autograd is to record a call with these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def backward(
    dy: Tensor,
    x: Tensor,
    shape: Shape,
    weight: Affine,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of x, weight and bias in float32.

    PyTorch's operators compute them, and can be differentiated again. Autograd casts each gradient
    to its tensor's dtype.

    Args:
        dy: The gradient of the output, shape of `x`, any dtype.
        x: Input, shape (..., *shape).
        shape: The trailing dimensions that were normalised.
        weight: Scale, or None.
        mean: Of each row, float32, shape (..., 1, ..., 1).
        rstd: 1 / sqrt(variance + eps), the same.
        wanted: Which gradients are computed: of x, weight and bias. The others are None.
    """
    scale = scale_of(x, shape, weight)
    # The second `scale` stands for bias, of which the operator takes the shape alone.
    dx, dweight, dbias = operator(
        dy.float(), x.float(), shape, mean, rstd, scale, scale, list(wanted)
    )
    return dx, dweight, dbias


def scale_of(x: Tensor, shape: Shape, weight: Affine) -> Tensor:
    """Return `weight` in float32, or ones if there is none.

    Without a float32 parameter PyTorch's mixed kernel on CPU rounds mean and rstd, and with a bias
    alone PyTorch's own double backward fails (torch 2.13, 2.15).
    """
    return x.new_ones(tuple(shape), dtype=torch.float32) if weight is None else weight.float()


never_a_frame_of_its_own(can_be_saved)
never_a_frame_of_its_own(takes, nor_what_it_calls=True)
