"""The hot path: is this call lowered, to which dtype, and by which backend."""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
from collections.abc import Callable

import torch

# TorchScript looks up the names in the source of the wrapped function here, in the wrapper's
# module: those of LayerNorm.forward are F and Tensor.
import torch.nn.functional as F  # noqa: F401
from torch import Tensor

from lpln_autopatch.backends import Backend, native
from lpln_autopatch.precision import NoEffectWarning
from lpln_autopatch.torch_compat import (
    autocast_dtype,
    is_dynamo_compiling,
    is_tracing,
    never_a_frame_of_its_own,
    run_while_compiling,
    traced_like_torch_nn,
)

EXEMPT = "_lpln_autopatch_exempt"
"""The attribute that marks a module as exempt."""

Forward = Callable[[torch.nn.LayerNorm, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Lowering:
    """How calls are lowered while a precision is active.

    Attributes:
        precision: Its name, for the warning when it does not engage.
        dtypes: The autocast dtypes for which it engages.
        backend: What normalises.
    """

    precision: str
    dtypes: tuple[torch.dtype, ...]
    backend: Backend


# A plain global, because Dynamo guards on one: compiled code follows every change, and keeps
# the lowered and the stock variant side by side. Reading a ContextVar would break the graph.
active: Lowering | None = None


def lowering_forward(original: Forward) -> Forward:
    """`LayerNorm.forward` that lowers what `lowered_dtype` says, and is `original` otherwise.

    A plain function: Dynamo sees through a `wrapt.FunctionWrapper` to the original's code, and
    compiled code would run stock. TorchScript compiles the original's source, by `__wrapped__`.
    """
    is_torchs_own = type(original) is types.FunctionType and original.__globals__ is vars(
        torch.nn.modules.normalization
    )
    wrapper = _over_torchs_own(original) if is_torchs_own else _over_a_foreign_one(original)
    return traced_like_torch_nn(functools.wraps(original)(wrapper))


_torchs_own: Forward


def _over_torchs_own(original: Forward) -> Forward:
    # Not a closure: if somebody puts a `wrapt.FunctionWrapper` above ours, Dynamo sees through it
    # to our code, but then looks for our closure (or defaults) on theirs, and fails.
    global _torchs_own
    _torchs_own = original

    def forward(self: torch.nn.LayerNorm, input: Tensor) -> Tensor:
        lowering = active
        if lowering is None:
            return _torchs_own(self, input)
        dtype = lowered_dtype(lowering, self, input)
        if dtype is None:
            return _torchs_own(self, input)
        return run_lowered(lowering, self, input, dtype)

    return forward


def _over_a_foreign_one(original: Forward) -> Forward:
    # A backend takes the place of torch's own forward, never of one that somebody else put there.
    def forward(self: torch.nn.LayerNorm, input: Tensor) -> Tensor:
        lowering = active
        dtype = None if lowering is None else lowered_dtype(lowering, self, input)
        if dtype is None:
            return original(self, input)
        # Upcast what `original` would round to one low precision and we to the other.
        x = input if input.dtype in (torch.float32, dtype) else input.float()
        return original(self, x).to(dtype=dtype)

    return forward


@never_a_frame_of_its_own
def run_lowered(
    lowering: Lowering, module: torch.nn.LayerNorm, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """Normalise `x` in `dtype` with the parameters of `module`, by the backend in eager mode."""
    # For compiled code float32 is also the fastest: Inductor fuses the upcast, the norm and the
    # downcast into one kernel, and saves the unrounded x for backward. No autocast region enters
    # the graph: with one, torch 2.13's AOTAutograd cache is bypassed.
    normalise = native.normalise_in_float32 if is_dynamo_compiling() else lowering.backend
    return normalise(x, module.normalized_shape, module.weight, module.bias, module.eps, dtype)


@never_a_frame_of_its_own
def lowered_dtype(lowering: Lowering, module: torch.nn.LayerNorm, x: Tensor) -> torch.dtype | None:
    """The dtype to which this call is lowered, or None if it is stock."""
    # An fx.Proxy gets here when a LayerNorm is the root that fx traces.
    if not isinstance(x, Tensor):
        return None
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return None
    # Autocast itself never touches float64.
    if x.dtype is not torch.float32 and (x.dtype is torch.float64 or not x.is_floating_point()):
        return None
    if is_dynamo_compiling():
        # Dynamo guards on this way of reading the mark, and on no other.
        stock = getattr(module, EXEMPT, False)
    else:
        # Module.__getattr__ takes longer to find a name missing than all else here together.
        # TorchScript gets the stock forward.
        stock = EXEMPT in module.__dict__ or is_tracing()
    if stock:
        return None
    if dtype not in lowering.dtypes:
        _warn_of_other_dtype(lowering.precision, dtype)
        return None
    return dtype


_warned: set[str] = set()


@run_while_compiling
def _warn_of_other_dtype(precision: str, dtype: torch.dtype) -> None:
    if precision in _warned:
        return
    _warned.add(precision)
    warnings.warn(
        f"precision {precision!r} is active, but autocast runs in {dtype}: "
        "LayerNorm stays as PyTorch has it. Precision 'amp' engages for float16 and bfloat16.",
        NoEffectWarning,
        stacklevel=2,
    )
