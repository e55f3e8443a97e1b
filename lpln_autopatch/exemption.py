"""What keeps calls stock: exempt modules, and whatever else runs a function stock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from lpln_autopatch.torch_compat import (
    HOOKS_RUN_ALWAYS,
    drop_compiled_code_that_cannot_follow,
    never_a_frame_of_its_own,
    remove_forward_hooks,
)

MARK = "_lpln_autopatch_exempt"
"""The attribute that marks a module as exempt."""

BENEATH = "beneath another patcher"
"""Why another patcher's function, which ours calls and then rounds, runs stock."""

# Counts the calls of `mark`, for compiled code: Dynamo does not guard on a module's hooks. A
# string, because Dynamo may make a symbol of an integer that changes.
changes = "0"


class _Thread(threading.local):
    """Why the calls of this thread are stock now, outermost reason first.

    A list, because Dynamo follows what is appended to one, and not what is assigned to an
    attribute of a thread's own.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []


_thread = _Thread()


def why_stock() -> str | None:
    """Why the calls of this thread are stock now, or None if nothing here says so."""
    return _thread.reasons[-1] if _thread.reasons else None


def is_exempt_now() -> bool:
    """Whether this thread is inside an exempt module."""
    return "exempt" in _thread.reasons


def run_stock(reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `function`, and have every norm that it calls in this thread stock, for `reason`."""
    _thread.reasons.append(reason)
    try:
        return function(*args, **kwargs)
    finally:
        _thread.reasons.pop()


def mark(module: torch.nn.Module, exempt: bool | str) -> None:
    """Mark `module` and every module that is inside it now with `exempt`; False takes marks off."""
    global changes
    for submodule in module.modules():
        vars(submodule).pop(MARK, None)
        remove_forward_hooks(submodule, _enter, _leave)
        if exempt:
            setattr(submodule, MARK, exempt)
            if HOOKS_RUN_ALWAYS and _may_call_a_norm_itself(submodule):
                submodule.register_forward_pre_hook(_enter, prepend=True)
                submodule.register_forward_hook(_leave, always_call=True)
    changes = str(int(changes) + 1)
    drop_compiled_code_that_cannot_follow()


def _enter(module: torch.nn.Module, args: object) -> None:
    _thread.reasons.append("exempt")


def _leave(module: torch.nn.Module, args: object, output: object) -> None:
    # Nothing is there if another pre-hook raised before ours ran.
    if _thread.reasons:
        _thread.reasons.pop()


def _may_call_a_norm_itself(module: torch.nn.Module) -> bool:
    """Whether hooks are needed.

    LayerNorm's own forward looks at the mark, and the other modules of torch.nn call no norm but
    GroupNorm and RMSNorm. TorchScript compiles modules that have no hooks.
    """
    if "forward" in vars(module) or type(module).__name__ in ("GroupNorm", "RMSNorm"):
        return True
    home = getattr(type(module).forward, "__module__", None) or ""
    return not home.startswith(("torch.nn.", "torch.jit.", "lpln_autopatch."))


for _function in (why_stock, run_stock, _enter, _leave):
    never_a_frame_of_its_own(_function)
