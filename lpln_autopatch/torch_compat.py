"""Every branch on a torch version. Each names the version that lets it be deleted."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

TORCH_VERSION = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])

_F = TypeVar("_F", bound=Callable[..., Any])


if TORCH_VERSION >= (2, 4):

    def autocast_dtype(device_type: str) -> torch.dtype | None:
        """The dtype that autocast runs `device_type` in now, or None where it is off.

        None too for a device type that autocast does not know, such as meta: asking torch
        whether it is enabled there raises.
        """
        # The two that every build knows need not be asked for.
        if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
            return None
        if not torch.is_autocast_enabled(device_type):
            return None
        return torch.get_autocast_dtype(device_type)

else:  # until torch 2.4: one pair of functions for each device type

    def autocast_dtype(device_type: str) -> torch.dtype | None:
        """The dtype that autocast runs `device_type` in now, or None where it is off."""
        if device_type == "cuda" and torch.is_autocast_enabled():
            return torch.get_autocast_gpu_dtype()
        if device_type == "cpu" and torch.is_autocast_cpu_enabled():
            return torch.get_autocast_cpu_dtype()
        return None


if TORCH_VERSION >= (2, 0):
    # A context manager in C, in a seventh of the time of `torch.autocast(enabled=False)`, which
    # reads and restores five settings. The graphs that AOTAutograd compiles enter it too.
    autocast_disabled: Callable[[], AbstractContextManager[Any]] = torch._C._DisableAutocast
else:  # until torch 2.0: it is no context manager there

    def autocast_disabled() -> AbstractContextManager[Any]:
        return torch.autocast("cuda" if torch.is_autocast_enabled() else "cpu", enabled=False)


is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def forward_mode_is_on() -> bool:
    """Whether a level of forward-mode differentiation is open, `torch.func.jvp`'s included."""
    return torch.autograd.forward_ad._current_level >= 0


# until torch 2.2: the CPU kernel refuses float32 parameters with a float16 input (and, until
# 2.0, a bfloat16 one), and is far off in bfloat16 (torch 1.13: 0.18 relative error at mean 64).
CPU_NORMALISES_LOW_PRECISION = TORCH_VERSION >= (2, 2)


# until torch 1.13: LayerNorm on CUDA has no bfloat16 kernel.
CUDA_NORMALISES_BFLOAT16 = TORCH_VERSION >= (1, 13)


if TORCH_VERSION >= (2, 1):
    is_dynamo_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling
else:  # until torch 2.1: Dynamo had no public flag, and inlined no module of torch's own

    def is_dynamo_compiling() -> bool:
        return False


def run_while_compiling(function: _F) -> _F:
    """Make Dynamo call `function` for real while it traces, and take its result as a constant.

    What `torch.compiler.assume_constant_result` does, less the seconds that importing Dynamo
    takes in a program that never compiles.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def drop_compiled_code() -> None:
    """Make every compiled function compile again at its next call.

    Dynamo does not guard on `LayerNorm.forward`: what it compiled before the method was
    patched would go on running the old one.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def drop_code_that_cannot_follow() -> None:
    """Drop compiled code where it does not guard on what `LayerNorm.forward` reads.

    until torch 2.5: Dynamo puts a call of torch's own modules into the graph without tracing it.
    """
    if TORCH_VERSION < (2, 5):
        drop_compiled_code()


# Of `torch.utils.checkpoint`: the lowest points that every route to a recomputation passes,
# and which positional argument of each is the function that will run again in backward.
# until torch 2.1: non-reentrant checkpointing keeps no frame; its function is wrapped.
CHECKPOINT_ENTRIES = {
    "CheckpointFunction.forward": 1,
    (
        "_CheckpointFrame.__init__" if TORCH_VERSION >= (2, 1) else "_checkpoint_without_reentrant"
    ): 0,
}

# What runs first in a recomputation, and the attribute of its `self` that holds the function.
CHECKPOINT_RECOMPUTATIONS = {"CheckpointFunction.backward": "run_function"}
if hasattr(getattr(torch.utils.checkpoint, "_CheckpointFrame", None), "get_inputs"):
    # until torch 2.9: frames have no method that runs first
    CHECKPOINT_RECOMPUTATIONS["_CheckpointFrame.get_inputs"] = "recompute_fn"
