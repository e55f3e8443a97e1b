"""A module that stands in for another one while its forward is tried, and watches it."""

from __future__ import annotations

import abc
import contextlib
import inspect
import math
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Shape(tuple[int, ...]):
    """The shape of a parameter or buffer."""


class Opaque(str):
    """The name of the type of a value that is neither a tensor nor plain."""


State = Mapping[str, object]
"""The attributes that a forward may read: each a `Shape`, an `Opaque`, or a plain value."""


def sizes_in(state: State) -> list[int]:
    """Return the sizes that the normalised dimension may have; 0 for any."""
    shapes = [value for value in state.values() if isinstance(value, Shape)]
    sizes = {next((n for n in reversed(shape) if n != 1), 1) for shape in shapes} - {1}
    if sizes:
        return list(sizes) if len(sizes) == 1 else []
    found = [0]
    for value in state.values():
        last = value[-1] if isinstance(value, (tuple, list)) and value else value
        if isinstance(last, float) and 1e-3 < last < 1e3:
            last = next((round(n) for n in (last**2, last**-2) if _is_close(n, round(n))), 0)
        if type(last) is int and 1 < last <= 2**16 and last not in found:
            found.append(last)
    return found


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def resized(state: State, size: int, new: int) -> State:
    """Return the state that a module of `size` features would have with `new` ones."""
    return {name: _resized(value, size, new) for name, value in state.items()}


def _resized(value: Any, size: int, new: int) -> Any:
    if isinstance(value, (tuple, list)):
        last = max((i for i, n in enumerate(value) if type(n) is int and n == size), default=None)
        return type(value)(new if i == last else n for i, n in enumerate(value))
    if type(value) is int and value == size:
        return new
    if isinstance(value, float):
        powers = (new**p for p in (0.5, -0.5, 1.0, -1.0) if _is_close(value, size**p))
        return next(powers, value)
    return value


@contextlib.contextmanager
def _generators_kept(deadline: float) -> Iterator[None]:
    """Restore the random generators of torch and Python at the end, unless that is too late."""
    before, pythons = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        # After the deadline the program has gone on, and has drawn numbers of its own.
        if time.monotonic() < deadline:
            if not torch.equal(before, torch.get_rng_state()):
                torch.set_rng_state(before)
            if random.getstate() != pythons:
                random.setstate(pythons)


class NotANorm(Exception):
    """The reason why a forward is not recognised."""


class _Stopped(BaseException):
    """Ends a forward that behaves like no norm. Not an Exception, which it might catch."""


class StandIn:
    """A module of class `cls` with this state, and with tensors of its own.

    Args:
        cls: The class. Only code that the forward calls is run.
        state: The attributes that the forward may read.
        tensors: A tensor for each `Shape` in the state.
        training: The mode.
        deadline: The time of `time.monotonic` at which nobody waits for a run any more.
    """

    def __init__(
        self,
        cls: type,
        state: State,
        tensors: Mapping[str, Tensor],
        training: bool,
        deadline: float,
    ) -> None:
        self._cls, self._state, self._deadline = cls, state, deadline
        self._why = ""
        self._module: Any = object.__new__(self._watched())
        # Without the attributes of every module: no norm looks into its dict of parameters.
        plain = {
            name: list(value) if isinstance(value, list) else value
            for name, value in state.items()
            if value is not ... and not isinstance(value, (Shape, Opaque))
        }
        self._before = {"training": training, **tensors, **plain}
        self._tensors = list(tensors.values())
        object.__getattribute__(self._module, "__dict__").update(self._before)

    def run(self, forward: Any, x: Tensor) -> Any:
        """Return the output of `forward` for `x`.

        Raises:
            NotANorm: it reads an attribute that is not in the state, or stores one.
            Exception: the forward's own.
        """
        before = [t.detach().clone() for t in (x, *self._tensors)]  # `.data` counts no versions
        try:
            with _generators_kept(self._deadline):
                y = forward(self._module, x)
        except _Stopped:
            raise NotANorm(self._why) from None
        if self._why:
            raise NotANorm(self._why)
        found = object.__getattribute__(self._module, "__dict__")
        same = found.keys() == self._before.keys() and all(
            found[name] is value and not (isinstance(value, list) and value != self._state[name])
            for name, value in self._before.items()
        )
        if not same or not all(map(_are_equal, before, (x, *self._tensors))):
            raise NotANorm("it changes its module or its input")
        return y

    def _stop(self, why: str) -> None:
        self._why = why
        raise _Stopped

    def _watched(self) -> type:
        """Return a subclass that stores no attributes, and reads only those of the state."""
        if any("__init_subclass__" in vars(c) for c in self._cls.__mro__ if not _is_neutral(c)):
            raise NotANorm("its class has __init_subclass__")
        if type(self._cls) not in (type, abc.ABCMeta):
            raise NotANorm("its class has a metaclass")

        def read(module: Any, name: str) -> Any:
            if time.monotonic() > self._deadline:
                self._stop("nobody waits for its trial any more")
            if isinstance(self._state.get(name), Opaque):
                self._stop(f"it reads its {name}, a {self._state[name]}")
            if not (name in self._state or name == "training" or self._is_code(name)):
                self._stop(f"it reads its {name} in a way that cannot be followed")
            return super(watched, module).__getattribute__(name)

        def write(module: Any, name: str, *value: object) -> None:
            self._stop(f"it stores its {name}")

        def missing(module: Any, name: str) -> Any:
            raise AttributeError(name)

        methods = {"__getattribute__": read, "__getattr__": missing}
        methods |= {"__setattr__": write, "__delattr__": write}
        # `_StandIn` is not a norm's name, so that the subclass is not tried itself.
        watched: Any = type(self._cls)("_StandIn", (self._cls,), methods)
        made: type = watched
        return made

    def _is_code(self, name: str) -> bool:
        found = inspect.getattr_static(self._cls, name, None)
        if found is inspect.getattr_static(torch.nn.Module, name, None):
            return False
        return callable(found) or isinstance(found, (staticmethod, classmethod, property))


def _are_equal(before: Tensor, now: Tensor) -> bool:
    return torch.equal(before.nan_to_num(), now.detach().nan_to_num())


def _is_neutral(cls: type) -> bool:
    return cls is torch.nn.Module or cls.__module__ in ("builtins", "typing")
