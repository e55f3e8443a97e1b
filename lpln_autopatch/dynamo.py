"""How Dynamo is told that the wrappers are to be traced."""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import wrapt

from lpln_autopatch.torch_compat import DYNAMO_TRACES_NORMS

# Its own, and held for nothing else: Dynamo is not to be told under the lock of state.py.
_telling = threading.RLock()
_told = False


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

    if "torch._dynamo" in sys.modules:
        tell(importlib.import_module("torch._dynamo"))  # waits for a thread that is importing it
    else:
        wrapt.register_post_import_hook(tell, "torch._dynamo")


def _without_defaults(function: Callable[..., Any]) -> Callable[..., Any]:
    code, defaults = function.__code__, function.__defaults__
    copy = types.FunctionType(code, function.__globals__, function.__name__, defaults)

    def traced(*args: Any, **kwargs: Any) -> Any:
        return copy(*args, **kwargs)

    return traced
