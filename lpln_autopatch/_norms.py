"""The norms: the code that each of PyTorch's functions runs while it is exchanged."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

# TorchScript compiles what our wrapper wraps, and looks up the names in its source here: those of
# LayerNorm.forward are F and Tensor.
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import normalization

from lpln_autopatch import _forward
from lpln_autopatch._exchange import is_torchs_own
from lpln_autopatch._exemption import EXEMPT, is_exempt, run_stock
from lpln_autopatch._forward import decide_and_count, run_backend
from lpln_autopatch._torch_compat import (
    HAS_RMS_NORM,
    never_a_frame_of_its_own,
    traced_like_torchs_own,
)
from lpln_autopatch.backends import native

# Placeholders, until `bind_function` and `bind_forward` store the stock copies.
_layer_norm_forward: Callable[..., Tensor] = normalization.LayerNorm.forward
_layer_norm: Callable[..., Tensor] = F.layer_norm
_group_norm: Callable[..., Tensor] = F.group_norm
_rms_norm: Callable[..., Tensor] = getattr(F, "rms_norm", F.layer_norm)


def bind_function(norm: str, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return our function for `norm`, and give it the `stock` copy to call."""
    globals()[f"_{norm}"] = stock
    return FUNCTIONS[norm]


def bind_forward(norm: str, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return our forward for the module of `norm`, which calls the `stock` copy."""
    if norm == "layer_norm":
        global _layer_norm_forward
        _layer_norm_forward = stock
        return layer_norm_forward

    def forward(self: torch.nn.Module, input: Tensor) -> Tensor:
        y: Tensor = run_stock(EXEMPT, stock, self, input) if is_exempt(self) else stock(self, input)
        return y

    return traced_like_torchs_own(forward, normalization)


def layer_norm_forward(self: torch.nn.LayerNorm, input: Tensor) -> Tensor:
    # Stock's forward calls F.layer_norm, which lowers. Only the method knows the module.
    if is_exempt(self):
        y: Tensor = run_stock(EXEMPT, _layer_norm_forward, self, input)
        return y
    return _layer_norm_forward(self, input)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    request = _forward.active
    dtype, _ = decide_and_count(request, "layer_norm", input, weight)
    if dtype is not None:
        norm = "layer_norm"
        return run_backend(request, norm, input, normalized_shape, weight, bias, eps, dtype)
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    request = _forward.active
    dtype, _ = decide_and_count(request, "group_norm", input, weight)
    if dtype is not None:
        # PyTorch's function, not the operator: it checks the input.
        return native.lower(_group_norm, input, num_groups, weight, bias, eps, dtype)
    return _group_norm(input, num_groups, weight, bias, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    request = _forward.active
    dtype, _ = decide_and_count(request, "rms_norm", input, weight)
    if dtype is not None:
        # PyTorch's default is the eps of the dtype in which it computes: float32 under CUDA's
        # autocast.
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        norm = "rms_norm"
        return run_backend(request, norm, input, normalized_shape, weight, None, eps, dtype)
    return _rms_norm(input, normalized_shape, weight, eps)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    **({"rms_norm": rms_norm} if HAS_RMS_NORM else {}),
}
"""Our function for each function of torch.nn.functional, by its name there."""

MODULES = {"layer_norm": "LayerNorm", "group_norm": "GroupNorm", "rms_norm": "RMSNorm"}
"""The class of torch.nn that calls each function."""


def wrap_forward(original: Any) -> Callable[..., Any]:
    """Wrap LayerNorm.forward, for `wrapt.wrap_object`: the wrapper keeps exempt modules stock.

    The wrapper is a plain function with `__wrapped__`. Dynamo sees through a
    `wrapt.FunctionWrapper` to the original's code, and would not meet ours.
    """
    if is_torchs_own(original, normalization, "LayerNorm.forward"):
        # No closure: if somebody puts a `wrapt.FunctionWrapper` above it, Dynamo sees through that
        # to our code, but then looks for our closure on theirs, and fails.
        if vars(layer_norm_forward).get("__wrapped__") is not original:
            functools.update_wrapper(layer_norm_forward, original)
        return layer_norm_forward
    # An object that is not callable is a descriptor, such as a partialmethod.
    call = original if callable(original) else functools.partial(_call_bound, original)

    def forward_of_another_patcher(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_exempt(self):
            return run_stock(EXEMPT, call, self, *args, **kwargs)
        return call(self, *args, **kwargs)

    wrapper = traced_like_torchs_own(forward_of_another_patcher, normalization)
    return functools.wraps(original)(wrapper)


def is_our_wrapper(function: object) -> bool:
    """Return True if `wrap_forward` has made `function`."""
    return type(function) is types.FunctionType and function.__globals__ is globals()


def _call_bound(descriptor: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return descriptor.__get__(module, type(module))(*args, **kwargs)


traced_like_torchs_own(layer_norm_forward, normalization)
_function: Any
for _function in (*FUNCTIONS.values(), _call_bound):
    never_a_frame_of_its_own(_function)
