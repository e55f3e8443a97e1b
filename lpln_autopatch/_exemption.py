"""Reasons that keep the calls of a thread stock: exempt modules and classes, and `run_stock`."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lpln_autopatch import _dynamo
from lpln_autopatch._torch_compat import (
    DYNAMO_TRACES_NORMS,
    HOOKS_RUN_ALWAYS,
    drop_compiled_code_that_cannot_follow,
    is_dynamo_compiling,
    never_a_frame_of_its_own,
    remove_forward_hooks,
    run_while_compiling,
)

EXEMPT = "exempt"
"""The reason of a call in an exempt module."""

MARK = "_lpln_autopatch_exempt"
"""The attribute that marks a module as exempt."""

BY_NAME = "LPLN_EXEMPT"
"""The mark of a module that is exempt by its name: modules that are added to it inherit it."""

KEPT = "_lpln_autopatch_not_by_name"
"""Set on a module whose LPLN_EXEMPT mark `exempt(module, False)` has removed: it stays off."""

# Counts the changes that Dynamo does not guard on: of a module's hooks, and a switch in one thread
# while another compiles the forward of a class. A string, because Dynamo may make a symbol of an
# integer that changes.
changes = "0"
_has_hooked = False  # True once `mark` has given hooks to a module that may call a norm itself.
is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]
_classes: tuple[type[nn.Module], ...] = ()  # the exempt ones


class _Thread(threading.local):
    """The reasons why the calls of this thread are stock now, outermost first.

    Lists, because Dynamo follows an append to a list, and not an assignment to an attribute of a
    `threading.local`. Not one list of pairs: code behind a graph break guards on `reasons`, and
    would be compiled anew for each module in it.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.inside: list[nn.Module] = []  # the exempt modules that this thread is inside


_thread = _Thread()


def why_stock() -> str | None:
    """Return the reason why the calls of this thread are stock now, or None."""
    return _thread.reasons[-1] if _thread.reasons else None


def is_inside_exempt_module() -> bool:
    """Return True if this thread is inside an exempt module."""
    return EXEMPT in _thread.reasons


def run_stock(reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `function`, and keep every norm that it calls in this thread stock, for `reason`."""
    _thread.reasons.append(reason)
    try:
        return function(*args, **kwargs)
    finally:
        _thread.reasons.pop()


def is_exempt(module: torch.nn.Module) -> bool:
    """Return True if `module` is exempt.

    Dynamo guards on `hasattr`, and not on the absence (torch 2.13) or the presence (2.5 to 2.11) of
    a key in a `__dict__`.
    """
    if is_dynamo_compiling():
        is_one = hasattr(module, MARK)
    else:  # a class may have a __getattribute__ of its own
        is_one = MARK in object.__getattribute__(module, "__dict__")
    return is_one or isinstance(module, _classes)


def mark(module: nn.Module, exempt: bool | str) -> None:
    """Mark `module` and every module that is inside it now with `exempt`; False takes marks off."""
    global _has_hooked
    _dynamo.note_switch()
    fast = {m for layer in module.modules() if _has_fast_path(layer) for m in layer.modules()}
    for submodule in module.modules():
        state = vars(submodule)
        if exempt == BY_NAME and KEPT in state:
            continue
        was = state.pop(MARK, None)
        remove_forward_hooks(submodule, _enter, _leave)
        if not exempt:
            if was == BY_NAME:
                setattr(submodule, KEPT, True)
            continue
        state.pop(KEPT, None)
        setattr(submodule, MARK, exempt)
        calls_a_norm = _may_call_a_norm_itself(submodule)
        _has_hooked |= calls_a_norm
        # A LayerNorm may be given another forward, or another class.
        later = isinstance(submodule, nn.LayerNorm) and submodule not in fast
        if HOOKS_RUN_ALWAYS and (calls_a_norm or later):
            submodule.register_forward_pre_hook(_enter, prepend=True)
            submodule.register_forward_hook(_leave, always_call=True)
    _outdate_compiled_code()


def outdate() -> None:
    """Outdate the compiled code that guards on `changes`."""
    global changes
    changes = str(int(changes) + 1)


def _outdate_compiled_code() -> None:
    """Have compiled code follow a change of marks."""
    outdate()
    _dynamo.note_switch()
    drop_compiled_code_that_cannot_follow()


# TorchScript compiles a module's hooks. So these have the types of a norm's forward.
def _enter(module: nn.Module, args: tuple[Tensor]) -> None:
    if not is_scripting():
        _thread.reasons.append(EXEMPT)
        _thread.inside.append(module)


def _leave(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    if not is_scripting():
        _end_of(module)


def _end_of(module: nn.Module) -> None:
    # If another pre-hook raised before ours ran, there is nothing to end.
    if _thread.inside and _thread.inside[-1] is module:
        _thread.inside.pop()
        _thread.reasons.pop()


def mark_class(cls: type[nn.Module], exempt: bool) -> None:
    """Have all instances of `cls` exempt, also those that are made later; False ends that."""
    global _classes
    if exempt == (cls in _classes):
        return
    _dynamo.note_switch()
    if exempt:
        own, call = vars(cls).get("__call__"), _exempting(cls.__call__)
        vars(call)["_own"] = own
        cls.__call__ = call  # type: ignore[method-assign]
        _classes += (cls,)
    else:
        _classes = tuple(each for each in _classes if each is not cls)
        ours: Any = vars(cls).get("__call__")
        if getattr(ours, "__globals__", None) is globals():  # or another patcher's is above
            if ours._own is None:
                del cls.__call__
            else:
                cls.__call__ = ours._own  # type: ignore[method-assign]
    _outdate_compiled_code()


def _exempting(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Dynamo guards on what it compares, and on no attribute of a class.
        if isinstance(self, _classes):
            return run_stock(EXEMPT, call, self, *args, **kwargs)
        return call(self, *args, **kwargs)

    return never_a_frame_of_its_own(__call__)


def guard_on_changes() -> bool:
    """Return False. Dynamo guards on a global that decides a branch, and this returns to one."""
    return changes == ""


@run_while_compiling
def guard_on_hooks() -> None:
    """Have Dynamo guard on the hooks of modules in code with a lowered norm.

    By default Dynamo guards on a module's hooks only if it has some. So it would run the code of
    a module without hooks for an exempt one.
    """
    if _has_hooked and DYNAMO_TRACES_NORMS:
        # Not in `mark`: each thread has a value of its own (torch 2.13).
        config: Any = importlib.import_module("torch._dynamo.config")
        config.skip_nnmodule_hook_guards = False


def _may_call_a_norm_itself(module: nn.Module) -> bool:
    """Return True if `module` needs hooks.

    LayerNorm's own forward looks at the mark. Of the other modules of torch.nn only GroupNorm and
    RMSNorm call a norm.
    """
    if "forward" in vars(module) or type(module).__name__ in ("GroupNorm", "RMSNorm"):
        return True
    home = getattr(type(module).forward, "__module__", None) or ""
    return not home.startswith(("torch.nn.", "torch.jit.", "lpln_autopatch."))


def _has_fast_path(module: nn.Module) -> bool:
    """Return True if `module` runs a fused operation in `eval()`, unless a part of it has hooks."""
    return isinstance(module, nn.TransformerEncoderLayer)


for _function in (guard_on_changes, is_exempt, why_stock, run_stock, _enter, _leave, _end_of):
    never_a_frame_of_its_own(_function)
