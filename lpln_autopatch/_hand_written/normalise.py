"""Compute a hand-written norm in the autocast dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpln_autopatch._forward import run_backend
from lpln_autopatch._hand_written.form import Form
from lpln_autopatch._request import Request
from lpln_autopatch._torch_compat import is_compiling, never_a_frame_of_its_own
from lpln_autopatch.backends import native
from lpln_autopatch.backends.protocol import Affine


def normalise(
    request: Request, module: torch.nn.Module, x: Tensor, form: Form, dtype: torch.dtype
) -> Tensor:
    """Normalise `x` by the formula of `form`, in `dtype`.

    Args:
        request: The active request.
        module: Has the weight and the bias.
        x: Input, of the number of dimensions that the form is for; float32, float16 or bfloat16.
        form: The norm that the forward of the module computes.
        dtype: The autocast dtype.

    Returns:
        Tensor of the shape of x, in dtype, with the strides that the forward gives.
    """
    weight = getattr(module, form.weight) if form.weight else None
    bias = getattr(module, form.bias) if form.bias else None
    if weight is not None and form.adds_one:
        weight = weight.float() + 1
    rows = x
    if form.dim == 1:
        rows = x.movedim(1, -1)
        weight, bias = _flat(weight), _flat(bias)
    size = (rows.shape[-1],)
    operator = _operator(form.norm, size, weight, bias)
    if dtype is torch.float16:
        # x is not rounded first: a residual stream like T5's holds values that float16 does not.
        whole = operator or _OPERATORS[form.norm]
        y = native.lower_in_float32(whole, rows, size, weight, bias, form.eps, dtype)
    elif operator is None:
        y = run_backend(request, form.norm, rows, size, weight, bias, form.eps, dtype)
    else:
        y = native.lower(operator, rows, size, weight, bias, form.eps, dtype)
    if form.dim == 1:
        y = y.movedim(-1, 1)
    if form.strides == "contiguous":
        return y.contiguous()
    if form.strides == "last":
        return y.movedim(form.dim, -1).contiguous().movedim(-1, form.dim)
    return y if _descends(rows.stride()) else _in_the_order_of(x, y)


def _in_the_order_of(x: Tensor, y: Tensor) -> Tensor:
    """Return y with the order of elements that x has in memory."""
    if is_compiling():  # strides are symbols, which cannot be sorted
        return torch.empty_like(x, dtype=y.dtype).copy_(y)
    order = sorted(range(x.ndim), key=x.stride().__getitem__, reverse=True)
    return y.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])


def _flat(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.flatten()


def _descends(strides: Sequence[int]) -> bool:
    """Return True if contiguous output has its elements in the same order."""
    return all(strides[at - 1] >= strides[at] for at in range(1, len(strides)))


def _operator(
    norm: str, size: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> native.Operator | None:
    """Return an operator for a norm that no backend takes, or None.

    No backend takes an RMSNorm with a bias, or tensors that broadcast.
    """
    if any(t is not None and t.shape != size for t in (weight, bias)):
        return _scaled_layer_norm if norm == "layer_norm" else _scaled_rms_norm
    return _rms_norm if norm == "rms_norm" and bias is not None else None


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Affine, bias: Affine, eps: float) -> Tensor:
    y = torch.rms_norm(x, shape, weight, eps)
    return y if bias is None else y + bias


_OPERATORS: dict[str, native.Operator] = {"layer_norm": torch.layer_norm, "rms_norm": _rms_norm}


def _scaled_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Affine, bias: Affine, eps: float
) -> Tensor:
    return _scaled(torch.layer_norm(x, shape, None, None, eps), weight, bias)


def _scaled_rms_norm(
    x: Tensor, shape: Sequence[int], weight: Affine, bias: Affine, eps: float
) -> Tensor:
    return _scaled(torch.rms_norm(x, shape, None, eps), weight, bias)


def _scaled(y: Tensor, weight: Affine, bias: Affine) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


for _function in (normalise, _flat, _descends, _in_the_order_of, _operator, _rms_norm, _scaled):
    never_a_frame_of_its_own(_function)
