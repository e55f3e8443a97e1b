"""The formulas of norms, and their comparison with a run of a forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """The formula of a hand-written norm, for inputs with a certain number of dimensions.

    Attributes:
        norm: "rms_norm" or "layer_norm".
        dim: The dimension that is normalised: -1, or 1 for the channels of an image.
        size: Its size, or 0 for any.
        weight: The attribute that scales, or "".
        bias: The attribute that is added, or "".
        adds_one: True if it scales by 1 + weight.
        eps: Added to the mean square or to the variance.
        strides: The strides of the output: "input", as elementwise operators give; "contiguous"; or
            "last", contiguous if the normalised dimension were the last.
    """

    # A tuple of constants, because Dynamo must take it as one.

    norm: str
    dim: int
    size: int
    weight: str
    bias: str
    adds_one: bool
    eps: float
    strides: str


class Run(NamedTuple):
    """A run of a forward, in float32."""

    x: Tensor
    y: Tensor
    tensors: Mapping[str, Tensor]
    dy: Tensor
    gradients: Sequence[Tensor]  # of x and the tensors


def gradients_of(y: Tensor, dy: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    # Of a sum: `grad_outputs=dy` makes autograd import sympy, which takes a second.
    return torch.autograd.grad((y * dy).sum(), inputs, allow_unused=True)


def every_form(run: Run, dim: int, size: int) -> list[Form]:
    """Return every form with the tensors of `run`."""
    names = list(run.tensors)
    pairs = [(w, b) for w in (*names, "") for b in (*names, "") if {w, b} - {""} == {*names}]
    return [
        Form(norm, dim, size, weight, bias, adds_one, 0.0, "")
        for norm, (weight, bias) in itertools.product(("rms_norm", "layer_norm"), pairs)
        for adds_one in ((False, True) if weight else (False,))
        if weight != bias or not names
    ]


def scale_of(form: Form, run: Run) -> Tensor:
    """Return the scale of `form` in float64, in a shape that broadcasts with `_rows(form, ...)`."""
    if not form.weight:
        return torch.ones((), dtype=torch.float64)
    weight = run.tensors[form.weight].double() + form.adds_one
    return weight.flatten() if form.dim == 1 else weight


def _rows(form: Form, x: Tensor) -> Tensor:
    return x.double().movedim(form.dim, -1)


def eps_of(form: Form, run: Run) -> float:
    """Return the eps of `run`, or 0 if it has none.

    It follows from dx of a row of zeros, which is dy * weight / sqrt(eps), less its mean for
    LayerNorm.
    """
    dy = _rows(form, run.dy) * scale_of(form, run).detach()
    dx = _rows(form, run.gradients[0])
    zero = (_rows(form, run.x.detach()) == 0).all(-1)
    if form.norm == "layer_norm":
        dy = dy - dy.mean(-1, keepdim=True)
    eps = float((dy / dx)[zero].square().nanmedian())
    return float(f"{eps:.6g}") if math.isfinite(eps) else 0.0


def values_of(form: Form, run: Run) -> Tensor:
    """Return the output in float64, with the normalised dimension as the last."""
    rows = _rows(form, run.x)
    if form.norm == "layer_norm":
        rows = rows - rows.mean(-1, keepdim=True)
    y = rows * (rows.square().mean(-1, keepdim=True) + form.eps).rsqrt() * scale_of(form, run)
    if form.bias:
        bias = run.tensors[form.bias]
        y = y + (bias.flatten() if form.dim == 1 else bias)
    return y


def agrees(form: Form, run: Run) -> bool:
    """Return True if `form` in float64 gives the values and gradients of `run`."""
    x = run.x.detach().double().requires_grad_()
    tensors = {name: t.detach().double().requires_grad_() for name, t in run.tensors.items()}
    exact = run._replace(x=x, tensors=tensors)
    y = values_of(form, exact)
    with torch.no_grad():
        rows = _rows(form, x)
        mean = rows.mean(-1, keepdim=True) if form.norm == "layer_norm" else 0.0
        rstd = ((rows - mean).square().mean(-1, keepdim=True) + form.eps).rsqrt()
    dy = _rows(form, run.dy)
    gradients = gradients_of(y, dy, [x, *tensors.values()])
    dx = _rows(form, gradients[0])
    if not is_near(_rows(form, run.y.detach()), y.detach(), y.detach()):
        return False
    # dx is a sum of terms that cancel: its error is compared with their size.
    terms = (dy * scale_of(form, run).detach()).abs().amax(-1, keepdim=True) * rstd
    return is_near(_rows(form, run.gradients[0]), dx, terms, 1e-4) and all(
        is_near(float32.double(), float64, float64.abs().amax(), 1e-4)
        for float32, float64 in zip(run.gradients[1:], gradients[1:], strict=True)
    )


def is_near(given: Tensor, exact: Tensor, size: Tensor, tolerance: float = 1e-5) -> bool:
    error = (given - exact).abs()
    limit = size.abs().amax(-1, keepdim=True) if size.ndim else size
    return bool((error <= tolerance * limit).all())
