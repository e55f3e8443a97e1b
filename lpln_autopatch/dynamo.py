"""How Dynamo is told to trace the wrappers, and to compile anew what a switch outdated."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import wrapt

from lpln_autopatch.torch_compat import DYNAMO_TRACES_NORMS, never_a_frame_of_its_own

# Its own, and held for nothing else: Dynamo is not to be told under the lock of state.py.
_telling = threading.RLock()
_told = False

# Code that was traced through a wrapper is guarded on it. A string, because Dynamo may make a
# symbol of an integer that changes.
_generation = "0"
_switched = False  # Whether another thread changed something while this compilation ran.
_wrappers: list[weakref.ref[types.FunctionType]] = []  # a list: threads may append meanwhile
# Dynamo knows a code object by its address. Kept, so that no other one gets that.
_outdated: list[types.CodeType] = []


def trace_through(wrappers: Mapping[str, Callable[..., Any]]) -> None:
    """Have Dynamo trace `wrappers`, by the full name of the function that each takes the place of.

    It has a table of functions that it puts into a graph untraced, and looks each up by its name:
    a wrapper that is found there would run, or not, as it is when the graph is compiled, and a
    graph calls by name. torch.distributed has the table made anew.

    What it traces in their place has no defaults: it would look for those of a wrapper on a
    `wrapt.FunctionWrapper` that somebody has put above it, and fail.

    Several threads may call this at a time. Dynamo refuses to be told twice.
    """
    if not DYNAMO_TRACES_NORMS:
        return

    def tell(dynamo: Any) -> None:
        global _told
        with _telling:
            if _told:
                return
            _told = True
            for rules in dynamo.trace_rules.torch_name_rule_map:
                for name in wrappers:
                    rules.pop(name, None)
            dynamo.trace_rules.get_torch_obj_rule_map.cache_clear()
            for wrapper in wrappers.values():
                torch.compiler.substitute_in_graph(wrapper)(_without_defaults(wrapper))
                outdated_by_a_switch(wrapper)

    if "torch._dynamo" in sys.modules:
        tell(importlib.import_module("torch._dynamo"))  # waits for a thread that is importing it
    else:
        wrapt.register_post_import_hook(tell, "torch._dynamo")


def _without_defaults(function: Callable[..., Any]) -> Callable[..., Any]:
    code, defaults = function.__code__, function.__defaults__
    copy = types.FunctionType(code, function.__globals__, function.__name__, defaults)

    def traced(*args: Any, **kwargs: Any) -> Any:
        guard_on_generation()
        return copy(*args, **kwargs)

    return traced


def outdated_by_a_switch(wrapper: Any) -> None:
    """Have code compiled anew in which `wrapper` is missing because it was put on meanwhile."""
    _wrappers.append(weakref.ref(wrapper))


def guard_on_generation() -> bool:
    """For code that Dynamo traces through a wrapper: it guards on what it compares."""
    return _generation == ""


@contextlib.contextmanager
def switch() -> Iterator[None]:
    """Around a change of what is traced. What another thread compiles meanwhile is compiled anew.

    Dynamo traces first, and reads the values that it guards on after the backend has compiled. So
    code that was traced before the change would be guarded as if it had been traced after it.
    """
    _outdate_what_another_thread_compiles()
    try:
        yield
    finally:  # that one may have ended, and the next one begun before the change
        _outdate_what_another_thread_compiles()


def _outdate_what_another_thread_compiles() -> None:
    global _switched
    dynamo: Any = sys.modules.get("torch._dynamo")
    if not DYNAMO_TRACES_NORMS or not hasattr(dynamo, "convert_frame"):
        return
    # Nobody waits for a compilation. A thread that compiles has its own lock, and changes back
    # what it changes.
    if dynamo.convert_frame.compile_lock.acquire(blocking=False):
        dynamo.convert_frame.compile_lock.release()
        return
    _switched = True
    callbacks = dynamo.callback_handler
    if _end_of_compilation not in callbacks.end_callbacks:  # `torch.compiler.reset` forgets it
        callbacks.register_end_callback(_end_of_compilation)


def _end_of_compilation(*args: object) -> None:
    # Dynamo holds locks while it calls this.
    global _generation, _switched
    if not _switched:
        return
    _switched = False
    _generation = str(int(_generation) + 1)
    # Code that was traced with no wrapper on is guarded on the code object of the function.
    for wrapper in filter(None, (reference() for reference in _wrappers)):
        _outdated.append(wrapper.__code__)
        wrapper.__code__ = wrapper.__code__.replace()


never_a_frame_of_its_own(guard_on_generation)
