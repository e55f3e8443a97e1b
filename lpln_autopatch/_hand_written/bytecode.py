"""Read from the bytecode of a forward the attributes of its module that it names."""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lpln_autopatch._exchange import stock_code

_EVERY_MODULES = frozenset(dir(torch.nn.Module()))


def reads(cls: type, function: Callable[..., Any]) -> Iterator[str]:
    """Yield the attributes of self that `function`, or a method that it calls, names.

    An attribute that it reads in another way is noticed by the trial.
    """
    for code in _codes(cls, function):
        for name in _attributes_of_self(code):
            found = inspect.getattr_static(cls, name, None)
            # A method, or a cached_property, which stores its value.
            is_code = callable(found) or hasattr(type(found), "__get__")
            if name not in _EVERY_MODULES and (not is_code or inspect.ismemberdescriptor(found)):
                yield name


def methods_called(cls: type, function: Callable[..., Any]) -> Iterator[str]:
    """Yield the names of the methods of self that `function` names."""
    for code in _codes(cls, function):
        for name in _attributes_of_self(code):
            if isinstance(inspect.getattr_static(cls, name, None), types.FunctionType):
                yield name


def asks_for_class(cls: type, function: Callable[..., Any]) -> bool:
    """Return True if `function` calls `type`: its use of the class cannot be followed."""
    return any(
        instruction.opname == "LOAD_GLOBAL" and instruction.argval == "type"
        for code in _codes(cls, function)
        for instruction in dis.get_instructions(code)
    )


def _codes(cls: type, function: Callable[..., Any]) -> Iterator[types.CodeType]:
    """Yield the code of `function`, and of the methods that it calls."""
    pending, seen = [function], set()
    while pending:
        try:
            unwrapped = inspect.unwrap(pending.pop())
        except ValueError:  # it wraps itself
            continue
        if not isinstance(unwrapped, types.FunctionType) or unwrapped in seen:
            continue
        seen.add(unwrapped)
        code = stock_code(unwrapped)
        yield code
        for name in _attributes_of_self(code):
            found = inspect.getattr_static(cls, name, None)
            found = found.fget if isinstance(found, property) else found
            if isinstance(found, types.FunctionType):
                pending.append(found)
        # `super().forward(x)` and `Base.forward(self, x)`: any method of that name.
        methods = (vars(c).get(name) for c in _bases(cls) for name in code.co_names)
        pending += [method for method in methods if isinstance(method, types.FunctionType)]


def _bases(cls: type) -> Iterator[type]:
    return (c for c in cls.__mro__ if c not in (torch.nn.Module, object))


def _attributes_of_self(code: types.CodeType) -> Iterator[str]:
    first = code.co_varnames[:1]
    itself = False  # True if the instruction before has loaded self
    for instruction in dis.get_instructions(code):
        if instruction.opname == "EXTENDED_ARG":
            continue
        value = instruction.argval
        if itself and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield value
        last = value[-1:] if isinstance(value, tuple) else (value,)  # Python 3.13 loads two at once
        itself = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and last == first
