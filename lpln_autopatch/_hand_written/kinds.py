"""The verdicts on hand-written forwards: one for each kind of module, found once and kept.

A kind is a class with the plain values and the shapes of tensors that its forward reads.
"""

from __future__ import annotations

import inspect
import re
import threading
import time
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lpln_autopatch import _exemption
from lpln_autopatch._hand_written.bytecode import asks_for_class, methods_called, reads
from lpln_autopatch._hand_written.form import Form
from lpln_autopatch._hand_written.recognition import recognise
from lpln_autopatch._hand_written.stand_in import NotANorm, Opaque, Shape
from lpln_autopatch._hand_written.trials import Failed
from lpln_autopatch._torch_compat import (
    DYNAMO_TELLS_FLOATS,
    is_dynamo_compiling,
    never_a_frame_of_its_own,
)

TRIAL = "a trial"
"""The reason of calls that a forward makes while it is tried."""

_T = TypeVar("_T")

# A filter, not a list: the trial decides.
_NAMED_NORM = re.compile(r"(?i:norm)|LN|RMS")

Values = tuple[Any, ...]
"""The attributes that a forward reads from its module, each as `describe` returns it."""

_UNINITIALIZED = (torch.nn.parameter.UninitializedParameter, torch.nn.parameter.UninitializedBuffer)
_Kind = tuple[type, Values, tuple[type, ...]]
_SEQUENCES = (tuple, list, torch.Size)
_TRIAL_SECONDS = 3  # it takes milliseconds
_MOST_KINDS = 256  # of one forward


class Forward:
    """The forward of classes that may compute norms by hand.

    Args:
        function: The forward itself.
        stock: A copy that always runs its own code.
    """

    def __init__(self, function: types.FunctionType, stock: Callable[..., Any]) -> None:
        self.function = function
        self.stock = stock
        _, _, *further = inspect.signature(function, follow_wrapped=False).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._defaults = tuple(p.default for p in further if p.kind in positional)
        self._named = {p.name: p.default for p in further if p.kind is p.KEYWORD_ONLY}
        self._names: dict[type, tuple[str, ...]] = {}
        self._methods: dict[type, tuple[str, ...]] = {}
        self._found: dict[_Kind, dict[int, Form | NotANorm]] = {}
        self._calls: Counter[_Kind] = Counter()  # of kinds whose trial raised

    def are_defaults(self, further: tuple[Any, ...], named: dict[str, Any]) -> bool:
        """Return True if the arguments after the tensor are the defaults."""
        if not further and not named:
            return True
        return (
            len(further) == len(self._defaults)
            and all(given is own for given, own in zip(further, self._defaults, strict=True))
            and named.keys() == self._named.keys()
            and all(named[name] is own for name, own in self._named.items())
        )

    def names(self, cls: type) -> tuple[str, ...]:
        """Return the names of the attributes that it may read from an instance of `cls`."""
        found = self._names.get(cls)
        if found is None:
            names = set(reads(_own(cls), self.function)) if _reads_as_others(cls) else ()
            found = self._names[cls] = tuple(sorted(names))
        return found

    def methods(self, cls: type) -> tuple[str, ...]:
        """Return the names of the methods of an instance of `cls` that it may call."""
        found = self._methods.get(cls)
        if found is None:
            names = set(methods_called(_own(cls), self.function))
            found = self._methods[cls] = tuple(sorted(names))
        return found

    def form(self, cls: type, values: Values, rank: int) -> Form | str:
        """Return its form for inputs with `rank` dimensions, or the reason why it has none.

        Args:
            cls: The class of the module.
            values: The attributes `names(cls)` of the module.
            rank: The number of dimensions of the input.
        """
        key = cls, values, tuple(map(type, values))  # 1 and True are equal
        found = self._found.get(key) or self._try(key)
        result = found.get(rank) or NotANorm(f"it is not known for inputs of {rank} dimensions")
        if isinstance(result, Failed) and self._is_time_to_retry(key):
            result = self._try(key).get(rank, result)
        return result if isinstance(result, Form) else str(result)

    def _try(self, key: _Kind) -> dict[int, Form | NotANorm]:
        if len(self._found) >= _MOST_KINDS:  # a number changes at each call: no time for trials
            return dict.fromkeys(range(1, 6), NotANorm("it has too many kinds"))
        try:
            found = in_a_thread(lambda: self._recognise(*key[:2]))
        except NotANorm as error:
            found = dict.fromkeys(range(1, 6), error)
        except Exception as error:  # of its backward, for example
            failed = Failed(f"it cannot be tried: {type(error).__name__}: {error}")
            found = dict.fromkeys(range(1, 6), failed)
        self._found[key] = found
        return found

    def _is_time_to_retry(self, key: _Kind) -> bool:
        # A trial may have raised for a reason of the moment, or may raise for ever: it is repeated
        # at the second, fourth, eighth ... call.
        calls = self._calls[key] = self._calls[key] + 1
        return calls > 1 and not calls & (calls - 1)

    def _recognise(self, cls: type, values: Values) -> dict[int, Form | NotANorm]:
        if not is_named_norm(cls):
            raise NotANorm("the name of its class is not that of a norm")
        if inspect.getattr_static(cls, "forward", None) is not self.function:
            raise NotANorm("it is a part of another forward")
        if not _reads_as_others(cls):
            raise NotANorm("its class has a __getattr__ of its own")
        if asks_for_class(_own(cls), self.function):
            raise NotANorm("it asks for its class")
        state = {n: _revived(v) for n, v in zip(self.names(cls), values, strict=True)}
        return recognise(_own(cls), self.stock, state, time.monotonic() + _TRIAL_SECONDS)


def candidate(cls: type) -> types.FunctionType | None:
    """Return the forward of `cls` if it may be a hand-written norm."""
    function = getattr(cls, "forward", None)
    if not is_named_norm(cls) or type(function) is not types.FunctionType:
        return None
    if inspect.getattr_static(cls, "forward", None) is not function:
        return None  # a partialmethod makes one for each call
    if "__signature__" in vars(function) or inspect.iscoroutinefunction(function):
        return None
    # PyTorch's own, or decorated by PyTorch, like a forward that compiles itself.
    if str(function.__globals__.get("__name__")).startswith(("torch.", "lpln_autopatch.")):
        return None
    try:
        parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_one = [p.kind in positional and p.default is p.empty for p in parameters] or [False]
    optional = all(p.default is not p.empty or p.kind not in positional for p in parameters[2:])
    return function if takes_one[:2] == [True, True] and optional else None


def is_named_norm(cls: type) -> bool:
    """Return True if `cls` may be a norm by its name."""
    return _NAMED_NORM.search(cls.__name__) is not None


def describe(value: object) -> Any:
    """Return a constant that is equal for values that a forward cannot tell apart."""
    if isinstance(value, _UNINITIALIZED):
        return Opaque, type(value).__name__
    if isinstance(value, torch.Tensor):
        return Shape, tuple(value.shape)
    if isinstance(value, float) and DYNAMO_TELLS_FLOATS and is_dynamo_compiling():
        # Dynamo makes a symbol of a float that has changed.
        return torch.fx.experimental.symbolic_shapes.guard_scalar(value)
    if value is None or value is ... or type(value) in (bool, int, float, str, torch.dtype):
        return value
    kind = type(value)
    if kind in _SEQUENCES and isinstance(value, (tuple, list)) and len(value) <= 8:
        return kind, tuple([describe(each) for each in value])
    return Opaque, type(value).__name__


def _own(cls: type) -> type:
    """Return the class in the source: parametrizations and FSDP make one for each module."""
    return next((c for c in cls.__mro__ if not c.__module__.startswith("torch.")), cls)


def _reads_as_others(cls: type) -> bool:
    """Return True if reading an attribute of an instance runs no code of the class's own."""
    names = ("__getattr__", "__getattribute__")
    return all(getattr(cls, name) is getattr(torch.nn.Module, name) for name in names)


def _revived(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    kind, content = value
    return kind(map(_revived, content)) if kind in _SEQUENCES else kind(content)


def in_a_thread(function: Callable[[], _T]) -> _T:
    """Run `function` in a new thread, where no autocast and no mode of PyTorch's is active."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(_exemption.run_stock(TRIAL, function))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="lpln_autopatch", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no more threads, or Python is about to end
        raise Failed(f"it could not be tried: {error}") from None
    thread.join(_TRIAL_SECONDS)
    if thread.is_alive():  # it may wait for a lock that this thread holds, such as the import lock
        raise Failed(f"it takes more than {_TRIAL_SECONDS} s")
    if errors:
        raise errors[0]
    return results[0]


never_a_frame_of_its_own(describe)
