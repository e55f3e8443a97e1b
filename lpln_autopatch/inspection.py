"""What a forward calls, as far as its code shows. Nothing is run, and no module is imported."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.normalization import LayerNorm

from lpln_autopatch import forward


def is_ours(function: Any) -> bool:
    """Whether `function` is our wrapper, or a method made of it."""
    return getattr(next(_chain(function)), "__globals__", None) is vars(forward)


def wraps_ours(function: Any) -> bool:
    """Whether our wrapper is `function` or beneath it, by `__wrapped__` or in a closure."""
    return any(
        is_ours(candidate)
        for link in _chain(function)
        for candidate in (link, *_contents(getattr(link, "__closure__", None) or ()))
    )


def is_torchs_original(function: Any) -> bool:
    """Whether `function` is `LayerNorm.forward` as torch has it, or a method made of that."""
    return next(_chain(function)) is inspect.unwrap(vars(LayerNorm)["forward"])


def can_be_read(function: Any) -> bool:
    """Whether there is Python code to look at."""
    return any(hasattr(link, "__code__") for link in _chain(function))


def names_a_forward(function: Any, cls: type) -> bool:
    """Whether the code names any `forward`, as in `super().forward(x)`."""
    return any("forward" in _names_and_functions(link, cls)[0] for link in _chain(function))


def calls_layer_norm(function: Any, cls: type) -> bool:
    """Whether it calls a function of that name, such as `torch.nn.functional.layer_norm`.

    Not `self.layer_norm`, which is a module like any other.
    """
    return any(
        "layer_norm" in used.__name__
        for link in _chain(function)
        for used in _names_and_functions(link, cls)[1]
    )


def _chain(function: Any) -> Iterator[Any]:
    """The function of a method or partial, then what it wraps, and so on."""
    while function is not None:
        wrapped = getattr(function, "__wrapped__", None)
        if isinstance(function, functools.partial):
            function = function.func
        yield getattr(function, "__func__", function)
        function = wrapped


def _contents(cells: tuple[types.CellType, ...]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


@functools.lru_cache(maxsize=1024)
def _names_and_functions(function: Any, cls: type) -> tuple[frozenset[str], frozenset[Any]]:
    """All names in the code of `function`, and the functions among the globals it reads.

    The methods of `cls` that it names are looked into as well.
    """
    names: set[str] = set()
    used: set[Any] = set()
    functions = [function]
    for current in functions:  # which grows
        for code in _with_inner(getattr(current, "__code__", None)):
            names.update(code.co_names)
            used.update(_global_functions(code, current.__globals__))
            for name in code.co_names:
                method = inspect.getattr_static(cls, name, None)
                its_own = method is not inspect.getattr_static(torch.nn.Module, name, None)
                if its_own and isinstance(method, types.FunctionType) and method not in functions:
                    functions.append(method)
    return frozenset(names), frozenset(used)


def _with_inner(code: Any) -> Iterator[types.CodeType]:
    if isinstance(code, types.CodeType):
        yield code
        for constant in code.co_consts:
            yield from _with_inner(constant)


def _global_functions(code: types.CodeType, variables: dict[str, Any]) -> Iterator[Any]:
    """What `code` reads as `f`, `F.f` or `nn.functional.f`, if it is a function."""
    found: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            found = variables.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            # Not getattr: there are modules that import on demand.
            is_module = isinstance(found, types.ModuleType)
            found = vars(found).get(instruction.argval) if is_module else None
        elif instruction.opname != "EXTENDED_ARG":
            found = None
        if isinstance(found, types.FunctionType | types.BuiltinFunctionType):
            yield found
