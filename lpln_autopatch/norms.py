"""The norms: what is wrapped for each, how its call is read, and its function in PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

# TorchScript compiles what our wrappers wrap, and looks up the names in its source here: those of
# LayerNorm.forward are F and Tensor.
from torch import Tensor
from torch.nn.functional import _verify_batch_size  # type: ignore[attr-defined]  # noqa: F401
from torch.overrides import handle_torch_function, has_torch_function_variadic  # noqa: F401

from lpln_autopatch import forward
from lpln_autopatch.backends import native
from lpln_autopatch.dynamo import guard_on_generation, outdated_by_a_switch
from lpln_autopatch.exemption import BENEATH, is_marked, run_stock
from lpln_autopatch.forward import decide, run_backend
from lpln_autopatch.torch_compat import (
    HAS_RMS_NORM,
    never_a_frame_of_its_own,
    traced_like_torchs_own,
)

# What is beneath our wrapper of each. Globals, not closures: if somebody puts a
# `wrapt.FunctionWrapper` above one of ours, Dynamo sees through it to our code, but then looks for
# our closure on theirs, and fails.
_forward: Callable[..., Tensor] = torch.nn.modules.normalization.LayerNorm.forward
_layer_norm: Callable[..., Tensor] = F.layer_norm
_group_norm: Callable[..., Tensor] = F.group_norm
_rms_norm: Callable[..., Tensor] = getattr(F, "rms_norm", F.layer_norm)


def layer_norm_forward(self: torch.nn.LayerNorm, input: Tensor) -> Tensor:
    # LayerNorm.forward calls the function, which lowers. The method knows the module.
    if not forward.active.norms or not is_marked(self):
        return _forward(self, input)
    y: Tensor = run_stock("exempt", _forward, self, input)
    return y


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    lowering = forward.active
    if lowering.norms:
        dtype = decide(lowering, "layer_norm", input, weight)
        if not isinstance(dtype, str):
            return run_backend(lowering, input, normalized_shape, weight, bias, eps, dtype)
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    lowering = forward.active
    if lowering.norms:
        dtype = decide(lowering, "group_norm", input, weight)
        if not isinstance(dtype, str):
            # PyTorch's function, not the operator: it checks the input.
            return native.lower(_group_norm, input, num_groups, weight, bias, eps, dtype)
    return _group_norm(input, num_groups, weight, bias, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    lowering = forward.active
    if lowering.norms:
        dtype = decide(lowering, "rms_norm", input, weight)
        if not isinstance(dtype, str):
            # PyTorch's default is that of the dtype in which it computes: under CUDA's autocast,
            # float32.
            eps = torch.finfo(torch.float32).eps if eps is None else eps
            operator = _rms_norm_operator
            return native.lower(operator, input, normalized_shape, weight, None, eps, dtype)
    return _rms_norm(input, normalized_shape, weight, eps)


def _rms_norm_operator(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: None, eps: float
) -> Tensor:
    return torch.rms_norm(x, normalized_shape, weight, eps)


@dataclasses.dataclass(frozen=True)
class Target:
    """A function of PyTorch that is wrapped.

    Attributes:
        module: Where its path begins.
        path: Its name there, dotted.
        norm: The name of the norm that it computes.
        wrapper: What is put over torch's own.
        beneath: The name, here, of what that calls.
    """

    module: types.ModuleType
    path: str
    norm: str
    wrapper: Callable[..., Any]
    beneath: str

    @property
    def full_name(self) -> str:
        """The path from the top."""
        return f"{self.module.__name__}.{self.path}"

    def wrap(self, original: Any) -> Callable[..., Any]:
        """What takes the place of `original`: a plain function, with `__wrapped__`.

        Not a `wrapt.FunctionWrapper`: Dynamo sees through one to the original's code, and compiled
        code would run stock.
        """
        if is_torchs_own(original, self.module, self.path):
            globals()[self.beneath] = original
            wrapper = self.wrapper
        else:
            wrapper = traced_like_torchs_own(_over_a_foreign_one(self, original), self.module)
            outdated_by_a_switch(wrapper)
        return functools.wraps(original)(wrapper)


def is_torchs_own(function: Any, module: types.ModuleType, path: str) -> bool:
    """Whether `function` is what PyTorch has at `path` in `module`, and no other patcher's."""
    return (
        type(function) is types.FunctionType
        and function.__globals__ is vars(module)
        and function.__qualname__ == path
    )


def _over_a_foreign_one(target: Target, original: Any) -> Callable[..., Any]:
    """A wrapper over another patcher's function: that runs as it is, and its output is rounded.

    A backend takes the place of torch's own function, never of one that somebody else put there.
    """
    position = target.path.count(".")  # that of x: a method has its module before it
    # What is not callable is a descriptor, such as a partialmethod.
    call = original if callable(original) else functools.partial(_call_bound, original)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        guard_on_generation()
        lowering = forward.active
        if not lowering.norms:
            return call(*args, **kwargs)
        if position and is_marked(args[0]):
            return run_stock("exempt", call, *args, **kwargs)
        x: Any = args[position] if len(args) > position else kwargs.get("input")
        dtype = decide(lowering, target.norm, x, None)
        if isinstance(dtype, str):
            return call(*args, **kwargs)
        if x.dtype not in (torch.float32, dtype):
            # It would be rounded to the one low precision there, and to the other here.
            if len(args) > position:
                args = (*args[:position], x.float(), *args[position + 1 :])
            else:
                kwargs = {**kwargs, "input": x.float()}
        return run_stock(BENEATH, call, *args, **kwargs).to(dtype=dtype)

    return wrapper


def _call_bound(descriptor: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return descriptor.__get__(module, type(module))(*args, **kwargs)


TARGETS = (
    # The module that defines LayerNorm: `torch.nn.LayerNorm` may be another class by now, and the
    # instances made before that still run this one's forward.
    Target(
        torch.nn.modules.normalization,
        "LayerNorm.forward",
        "layer_norm",
        layer_norm_forward,
        "_forward",
    ),
    Target(F, "layer_norm", "layer_norm", layer_norm, "_layer_norm"),
    Target(F, "group_norm", "group_norm", group_norm, "_group_norm"),
    *([Target(F, "rms_norm", "rms_norm", rms_norm, "_rms_norm")] if HAS_RMS_NORM else []),
)

NAMES = tuple(dict.fromkeys(target.norm for target in TARGETS))
"""The norms that can be lowered with this torch, as LPLN_NORMS names them."""


for _target in TARGETS:
    traced_like_torchs_own(_target.wrapper, _target.module)
for _function in (_rms_norm_operator, _call_bound):
    never_a_frame_of_its_own(_function)
