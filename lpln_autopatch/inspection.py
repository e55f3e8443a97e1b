"""What a forward calls, as far as its code shows. Nothing is run, and no module is imported."""

from __future__ import annotations

import builtins
import dis
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.modules.normalization import LayerNorm

from lpln_autopatch import forward


def target(function: Any) -> Any:
    """`function`, or that of a method or partial."""
    return next(_chain(function), None)


def is_ours(function: Any) -> bool:
    """Whether `function` is our wrapper, or a method made of it."""
    found = target(function)
    return _is_python(found) and found.__globals__ is vars(forward)


def wraps_ours(function: Any) -> bool:
    """Whether our wrapper is `function` or beneath it, by `__wrapped__` or in a closure."""
    return any(
        is_ours(candidate) for link in _chain(function) for candidate in (link, *_contents(link))
    )


def is_torchs_original(function: Any) -> bool:
    """Whether `function` is `LayerNorm.forward` as torch has it, or a method made of that."""
    found = target(function)
    # Not what is at the bottom of LayerNorm.forward: that may be somebody's closure.
    return (
        _is_python(found)
        and found.__globals__ is vars(torch.nn.modules.normalization)
        and found.__qualname__ == "LayerNorm.forward"
    )


def can_be_read(function: Any) -> bool:
    """Whether `function` itself, not only what it says that it wraps, is Python code."""
    return _is_python(target(function))


class Reading(NamedTuple):
    """What the code of a forward shows.

    Attributes:
        names: All names of attributes and globals in it.
        functions: The functions that it takes from globals and closures.
        unknown: What it takes from there that cannot be told to call no other forward.
    """

    names: set[str]
    functions: list[Any]
    unknown: list[Any]

    @property
    def calls_a_forward(self) -> bool:
        """Whether it names any `forward`, as in `super().forward(x)`, or uses ours."""
        return "forward" in self.names or any(wraps_ours(used) for used in self.functions)

    @property
    def calls_layer_norm(self) -> bool:
        """Whether it uses a function of that name, such as `torch.nn.functional.layer_norm`.

        Not `self.layer_norm`, which is a module like any other.
        """
        return any("layer_norm" in used.__name__ for used in self.functions)

    def calls_what_is_unknown(self, module: torch.nn.Module) -> bool:
        """Whether it may call what is not followed, such as a module inside `module`."""
        own, classes = vars(module), type(module).__mro__
        # A method that calls super() has its class in the closure, or names it.
        itself = (module, *classes[: classes.index(LayerNorm)])
        return (
            any(not _is_in(itself, value) for value in self.unknown)
            or not self.names.isdisjoint(module._modules)
            or any(not _is_plain(own[name]) for name in self.names & own.keys())
        )


def read(function: Any, cls: type) -> Reading:
    """Look at the code of `function`, of what it wraps, and of the methods of `cls` it names.

    Of the functions that those take from globals and closures too, but no further.
    """
    reading = Reading(set(), [], [])
    links = [(link, True) for link in _chain(function)]
    seen = set()
    for link, follow in links:  # which grows
        if id(link) in seen or not _is_python(link):
            continue
        seen.add(id(link))
        for code in _with_inner(link.__code__):
            reading.names.update(code.co_names)
        for value in _values(link):
            if _is_python(value):
                reading.functions.append(value)
                if follow and not _is_torchs(value):
                    links += [(inner, False) for inner in _chain(value)]
                    continue
            elif isinstance(value, types.BuiltinFunctionType):
                reading.functions.append(value)
            if not _is_torchs(link) and not _is_plain(value):
                reading.unknown.append(value)
        for value in _attributes(cls, link.__code__) if follow else ():
            links += [(inner, True) for inner in _chain(value)]
            if not can_be_read(value) and not _is_plain(value):
                reading.unknown.append(value)
    if isinstance(function, functools.partial):
        bound = (*function.args, *function.keywords.values())
        reading.unknown.extend(value for value in bound if not _is_plain(value))
    return reading


def _is_in(values: Iterable[Any], wanted: Any) -> bool:
    return any(value is wanted for value in values)  # not by ==, which may be anything


def _chain(function: Any) -> Iterator[Any]:
    """The function of a method, property or partial, then what it wraps, and so on."""
    seen: list[Any] = []
    while function is not None and not _is_in(seen, function):
        seen.append(function)
        wrapped = getattr(function, "__wrapped__", None)
        # By type: a wrapt proxy has the attributes of what it wraps.
        if isinstance(function, functools.partial):
            function = function.func
        elif type(function) is property:
            function = function.fget
        elif type(function) in (types.MethodType, staticmethod, classmethod):
            function = function.__func__
        yield function
        function = wrapped


def _is_python(value: Any) -> bool:
    # Not isinstance: a wrapt proxy has the class and the globals of what it wraps.
    return type(value) is types.FunctionType


def _with_inner(code: Any) -> Iterator[types.CodeType]:
    if isinstance(code, types.CodeType):
        yield code
        for constant in code.co_consts:
            yield from _with_inner(constant)


def _contents(function: Any) -> Iterator[Any]:
    """What is in the closure of `function`."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _values(function: Any) -> Iterator[Any]:
    """What `function` takes from globals as `f`, `F.f` or `nn.functional.f`, or carries along."""
    yield from _contents(function)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    found: Any = None
    for code in _with_inner(function.__code__):
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL":
                found = function.__globals__.get(name, vars(builtins).get(name))
            elif instruction.opname == "IMPORT_NAME":
                found = builtins.__import__
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                # Not getattr: there are modules that import on demand.
                is_module = isinstance(found, types.ModuleType)
                found = vars(found).get(name) if is_module else None
            elif instruction.opname != "EXTENDED_ARG":
                found = None
            if found is not None:
                yield found


def _attributes(cls: type, code: types.CodeType) -> Iterator[Any]:
    """What the classes above `cls` have, but for Module's, under the names in `code`."""
    names = {name for inner in _with_inner(code) for name in inner.co_names}
    for base in cls.__mro__:
        if base not in torch.nn.Module.__mro__:
            yield from (vars(base)[name] for name in names & vars(base).keys())


def _is_torchs(value: Any) -> bool:
    # Not __module__ of a function: functools.wraps copies that.
    is_function = isinstance(value, types.FunctionType)
    name = value.__globals__["__name__"] if is_function else getattr(value, "__module__", None)
    return str(name).split(".")[0] == "torch"


_CALL_BY_NAME = (getattr, vars, globals, locals, eval, exec, builtins.__import__)


def _is_plain(value: Any) -> bool:
    """Whether `value` cannot lead to a LayerNorm's forward, as far as can be told."""
    if isinstance(value, type):
        if issubclass(value, torch.nn.Module):
            return False
        from_known = _is_torchs(value) or value.__module__ == "builtins"
        return from_known or issubclass(value, torch.autograd.Function)
    if isinstance(value, types.FunctionType):
        return _is_torchs(value)
    if isinstance(value, types.BuiltinFunctionType):
        return not _is_in(_CALL_BY_NAME, value)
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, torch.nn.Module):
        return False
    known = (types.ModuleType, types.NoneType, str, bytes, int, float, torch.Tensor)
    return isinstance(value, known) or _is_torchs(type(value))
