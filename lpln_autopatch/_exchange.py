"""Exchange the code of functions, and keep the function objects."""

from __future__ import annotations

import functools
import gc
import inspect
import types
from collections.abc import Callable
from typing import Any

import wrapt

from lpln_autopatch import _dynamo


class Exchange:
    """A Python function that runs other code for a while, and stays the same object.

    Whoever holds the function follows, however early it was bound. It can be pickled, and tables
    that are keyed by it go on working.

    Args:
        find: Gives the function.
        name: A name that is free in the globals of the function.
        replacement_of: Makes the replacement from the stock copy of the function.

    Attributes:
        function: The function, once `prepare` has found it.
        replacement: The function that `replacement_of` has made.
        runs: The function that runs in the place of its own code now, or None.
    """

    function: Any = None
    replacement: Callable[..., Any] | None = None
    runs: Callable[..., Any] | None = None

    def __init__(
        self,
        find: Callable[[], Any],
        name: str,
        replacement_of: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self._find = find
        self._name = name
        self._replacement_of = replacement_of

    @classmethod
    def of_torch(
        cls,
        module: types.ModuleType,
        path: str,
        replacement_of: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> Exchange:
        """Return the exchange of PyTorch's own function that has this dotted path in `module`."""
        name = "_lpln_autopatch_" + path.replace(".", "_")
        return cls(functools.partial(_torchs_own, module, path), name, replacement_of)

    def prepare(self) -> None:
        """Find the function, if that has not been done.

        Raises:
            RuntimeError: it is hidden by something that is no Python function, or exchanged by
                another copy of this package.
        """
        if self.function is not None:
            return
        function = self._find()
        # The name stays there for good: a thread may be about to read it.
        function.__globals__.setdefault(self._name, None)
        if self._name in function.__code__.co_names:
            raise RuntimeError(
                f"{function.__qualname__} is exchanged by another copy of lpln_autopatch that was "
                "imported before this one: call its disable()."
            )
        # Always the same two code objects: compiled code is guarded on them, and new ones for every
        # activation would mean a new graph for every activation.
        self._stock_code = _stock_codes[function] = function.__code__
        self._our_code = _code_that_calls(self._name, function)
        stock = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        stock.__kwdefaults__ = function.__kwdefaults__
        self.replacement = self._replacement_of(stock)
        self.function = function

    def run(self, replacement: Callable[..., Any] | None) -> None:
        """Have the function run `replacement` from now on, or its own code."""
        self.runs = _unfinished  # an interruption must not look like the state before
        code = self._stock_code if replacement is None else self._our_code
        self.function.__globals__[self._name] = replacement or self.replacement
        _dynamo.set_rule(self.function, self._name, replacement is not None)
        self.function.__code__ = code
        self.runs = replacement

    def tell_dynamo(self) -> None:
        """Tell Dynamo again, which may have been imported after the last change."""
        if self.runs is not None:
            _dynamo.set_rule(self.function, self._name, True, imported_now=True)

    def renew(self) -> None:
        """Outdate compiled code: replace both code objects by equal ones."""
        if self.function is None:
            return
        # Dynamo knows a code object by its address. Kept, so that no other one gets that.
        _outdated.extend((self._stock_code, self._our_code))
        self._stock_code, self._our_code = self._stock_code.replace(), self._our_code.replace()
        self.function.__code__ = self._stock_code if self.runs is None else self._our_code


def stock_code(function: types.FunctionType) -> types.CodeType:
    """Return the code of `function`, also while it is exchanged."""
    return _stock_codes.get(function, function.__code__)


_stock_codes: dict[types.FunctionType, types.CodeType] = {}
_outdated: list[types.CodeType] = []
_unfinished: Any = object()


def _torchs_own(module: types.ModuleType, path: str) -> Any:
    """Find PyTorch's own function at `path` in `module`, beneath any foreign one.

    Raises:
        RuntimeError: it is not there, and hidden by something that is no Python function.
    """
    found = wrapt.resolve_path(module, path)[2]
    *_, bottom = wrapt.wrapper_chain(found)
    function = getattr(bottom, "__func__", bottom)
    if is_torchs_own(function, module, path):
        return function
    if not inspect.isbuiltin(bottom):
        # A closure hides what it calls. Every function refers to the globals that it runs in. This
        # looks at every object there is, which takes long.
        for candidate in gc.get_referrers(vars(module)):
            if is_torchs_own(candidate, module, path):
                return candidate
    raise RuntimeError(
        f"{module.__name__}.{path} is {found!r}, which hides PyTorch's own Python function. "
        "lpln_autopatch changes that one: put it back, or enable lpln_autopatch first."
    )


def _code_that_calls(name: str, function: types.FunctionType) -> types.CodeType:
    """Make code with the signature of `function` that passes its arguments to the global `name`.

    It has the file and the line of PyTorch's code. So inspect, debuggers and TorchScript find
    PyTorch's source, and Dynamo treats it as PyTorch's.
    """
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    bare = [p.replace(default=p.empty, annotation=p.empty) for p in parameters]
    passed = ", ".join(_PASSED.get(p.kind, "{0}").format(p.name) for p in bare)
    original = function.__code__
    # Code can be exchanged only for code with the same free variables, which `super()` needs. The
    # line after `return` makes them free, and is not compiled.
    free = original.co_freevars
    made: dict[str, Any] = {}
    exec(
        f"def closure({', '.join(free)}):\n"
        f"    def function{inspect.Signature(bare)}:\n"
        f"        return {name}({passed})\n"
        f"        {', '.join(free) or 'pass'}\n"
        f"    return function.__code__",
        made,
    )
    code: types.CodeType = made["closure"](*free)
    place: dict[str, Any] = {
        key: getattr(original, key)
        for key in ("co_name", "co_filename", "co_firstlineno", "co_qualname")
        if hasattr(original, key)  # co_qualname: Python 3.11
    }
    return code.replace(**place)


_PASSED: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
}


def is_torchs_own(function: object, module: types.ModuleType, path: str) -> bool:
    """Return True if `function` is PyTorch's at `path` in `module`, and no other patcher's."""
    return (
        type(function) is types.FunctionType
        and function.__globals__ is vars(module)
        and function.__qualname__ == path
    )
