"""Dynamo: have it trace the exchanged functions, and outdate compiled code after a switch."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import wrapt

from lpln_autopatch._torch_compat import (
    DYNAMO_TRACES_NORMS,
    GRAPHS_GUARD_ON_CODE,
    PRECOMPILATION_CAN_BE_LEFT,
)

_stock_rules: dict[str, Any] = {}  # Dynamo's own, by the name of the function
_was_there = False  # True if Dynamo was imported before us, and may have compiled.
_warning: str | None = None  # for `settle`
_switched = False  # True if another thread has changed something during this compilation.
_renew: Callable[[], None] | None = None


def connect(tell: Callable[[], None], renew: Callable[[], None]) -> None:
    """Call `tell` when Dynamo is imported, and `renew` when a switch outdates compiled code."""
    global _was_there, _renew
    _renew = renew
    if not DYNAMO_TRACES_NORMS:
        return
    if "torch._dynamo" in sys.modules:
        _was_there = True
        importlib.import_module("torch._dynamo")  # waits for a thread that is importing it
        tell()
    else:
        wrapt.register_post_import_hook(lambda module: tell(), "torch._dynamo")


def set_rule(
    function: types.FunctionType, replacement: str, exchanged: bool, imported_now: bool = False
) -> None:
    """Have Dynamo trace `replacement` for `function` while it is `exchanged`, and only then.

    Dynamo has a table of functions that it puts into a graph untraced. PyTorch's norms are there.
    Untraced, an exchanged norm would be decided once, when the graph is made. And caches on disk,
    whose keys hold the name of the function, would mix up stock and lowered programs.

    Rules are replaced and never removed: another thread may be walking through the table.

    Args:
        function: The exchanged function.
        replacement: The name in its globals of the function that it runs.
        exchanged: False puts Dynamo's own rule back.
        imported_now: True if Dynamo has just been imported, and has compiled nothing.
    """
    global _warning
    trace_rules: Any = sys.modules.get("torch._dynamo.trace_rules")
    if not DYNAMO_TRACES_NORMS or not hasattr(trace_rules, "get_torch_obj_rule_map"):
        return
    if not (function.__module__ or "").startswith("torch."):
        return  # Dynamo always traces functions outside of torch
    name = f"{function.__module__}.{function.__qualname__}"
    by_function = trace_rules.get_torch_obj_rule_map
    has_compiled = by_function.cache_info().currsize and not imported_now
    if has_compiled and not _stock_rules and not GRAPHS_GUARD_ON_CODE:
        _warning = (
            "Code that torch.compile compiled before the first activation of lpln_autopatch cannot "
            "follow it before torch 2.12, and stays stock. Activate before it is compiled, or call "
            "torch.compiler.reset()."
        )
    for by_name in trace_rules.torch_name_rule_map:
        if name in by_name:
            stock = _stock_rules.setdefault(name, by_name[name])
            in_graph = not exchanged and GRAPHS_GUARD_ON_CODE
            rule = stock if in_graph else _traced(trace_rules.UserFunctionVariable, replacement)
            by_name[name] = rule
            if by_function.cache_info().currsize:
                by_function()[function] = rule


@functools.cache
def _traced(user_function: Any, replacement: str) -> Any:
    """Return a rule: trace the global `replacement` of the function in its place."""

    class Traced(user_function):  # type: ignore[misc]
        @classmethod
        def create_with_source(cls, value: Any, source: Any) -> Any:
            variable = super().create_with_source(value, source)  # it guards on the code
            code = _calls.__code__.replace(co_names=(replacement,))
            # Not the function itself: Dynamo would guard on its defaults, look for them on a
            # `wrapt.FunctionWrapper` that somebody has put above it, and fail.
            return cls(types.FunctionType(code, variable.fn.__globals__), source=variable.source)

    return Traced


def _calls(*args: Any, **kwargs: Any) -> Any:
    return replacement(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def settle(stacklevel: int) -> None:
    """Have compiled code follow a change where its guards cannot, or warn. Called under no lock."""
    global _warning
    dynamo: Any = sys.modules.get("torch._dynamo")
    config: Any = getattr(dynamo, "config", None)
    if getattr(config, "caching_precompile", False):
        # Precompiled code has no guard on the code of a function, and a lowered program would load
        # stock's from the disk.
        if PRECOMPILATION_CAN_BE_LEFT or not _was_there:
            config.caching_precompile = False
            _warning = (
                "lpln_autopatch switches torch._dynamo.config.caching_precompile off "
                "(TORCH_CACHING_PRECOMPILE): what it compiles would not follow a precision."
            )
        dynamo.reset_code_caches()
    warning, _warning = _warning, None
    if warning is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=stacklevel + 1)


def note_switch() -> None:
    """Have code that another thread is compiling now compiled anew.

    Dynamo traces first, and reads the values for its guards after the backend has compiled. So code
    that was traced before a change would be guarded as if it had been traced after it. Called
    before and after each change: the compilation may end, and the next begin, before the change.
    """
    global _switched
    convert_frame: Any = sys.modules.get("torch._dynamo.convert_frame")
    if not DYNAMO_TRACES_NORMS or not hasattr(convert_frame, "compile_lock"):
        return
    # Nobody waits for a compilation. A thread that compiles holds the lock itself, and changes back
    # its own changes. The lock's text is read: after `acquire(False)` an interruption might come
    # before the release.
    lock = repr(convert_frame.compile_lock)
    if lock.startswith("<unlocked") or f"owner={threading.get_ident()} " in lock:
        return
    _switched = True
    callbacks = sys.modules["torch._dynamo"].callback_handler
    if _end_of_compilation not in callbacks.end_callbacks:  # `torch.compiler.reset` forgets it
        callbacks.register_end_callback(_end_of_compilation)


def _end_of_compilation(*args: object) -> None:
    global _switched
    if _switched and _renew is not None:
        _switched = False
        _renew()
