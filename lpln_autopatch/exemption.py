"""What keeps calls stock: exempt modules, and whatever else runs a function stock.

Modules are exempt by a call, or by their names, from the moment they become part of a model.
"""

from __future__ import annotations

import importlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from lpln_autopatch import dynamo
from lpln_autopatch.torch_compat import (
    DYNAMO_TRACES_NORMS,
    HOOKS_RUN_ALWAYS,
    drop_compiled_code_that_cannot_follow,
    is_dynamo_compiling,
    never_a_frame_of_its_own,
    on_module_registration,
    remove_forward_hooks,
    run_while_compiling,
)

MARK = "_lpln_autopatch_exempt"
"""The attribute that marks a module as exempt."""

BY_NAME = "LPLN_EXEMPT"
"""The mark of a module that is exempt by its name: modules that are added to it inherit it."""

# Counts the calls of `mark`, for compiled code: Dynamo does not guard on a module's hooks. A
# string, because Dynamo may make a symbol of an integer that changes.
changes = "0"
_has_hooked = False  # Whether `mark` has given a module hooks.

_logger = logging.getLogger("lpln_autopatch")


class _Thread(threading.local):
    """Why the calls of this thread are stock now, outermost reason first.

    A list, because Dynamo follows what is appended to one, and not what is assigned to an
    attribute of a thread's own.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []


_thread = _Thread()


def why_stock() -> str | None:
    """Why the calls of this thread are stock now, or None if nothing here says so."""
    return _thread.reasons[-1] if _thread.reasons else None


def is_exempt_now() -> bool:
    """Whether this thread is inside an exempt module."""
    return "exempt" in _thread.reasons


def run_stock(reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `function`, and have every norm that it calls in this thread stock, for `reason`."""
    _thread.reasons.append(reason)
    try:
        return function(*args, **kwargs)
    finally:
        _thread.reasons.pop()


def is_marked(module: torch.nn.Module) -> bool:
    """Whether `module` is exempt.

    Dynamo guards on `hasattr`: not on what is missing in a `__dict__` (torch 2.13), nor on what is
    there (2.5 to 2.11).
    """
    return hasattr(module, MARK) if is_dynamo_compiling() else MARK in module.__dict__


def mark(module: torch.nn.Module, exempt: bool | str) -> None:
    """Mark `module` and every module that is inside it now with `exempt`; False takes marks off."""
    global changes, _has_hooked
    dynamo.note_switch()
    for submodule in module.modules():
        vars(submodule).pop(MARK, None)
        remove_forward_hooks(submodule, _enter, _leave)
        if exempt:
            setattr(submodule, MARK, exempt)
            if HOOKS_RUN_ALWAYS and _may_call_a_norm_itself(submodule):
                submodule.register_forward_pre_hook(_enter, prepend=True)
                submodule.register_forward_hook(_leave, always_call=True)
                _has_hooked = True
    changes = str(int(changes) + 1)
    dynamo.note_switch()
    drop_compiled_code_that_cannot_follow()


def _enter(module: torch.nn.Module, args: object) -> None:
    _thread.reasons.append("exempt")


def _leave(module: torch.nn.Module, args: object, output: object) -> None:
    # Nothing is there if another pre-hook raised before ours ran.
    if _thread.reasons:
        _thread.reasons.pop()


@run_while_compiling
def guard_on_hooks() -> None:
    """For code that Dynamo traces through a norm that is lowered.

    By default Dynamo guards on a module's hooks only if it has some. So it would run the code of
    a module without hooks for an exempt one.
    """
    if _has_hooked and DYNAMO_TRACES_NORMS:
        # Not in `mark`: each thread has a value of its own (torch 2.13).
        config: Any = importlib.import_module("torch._dynamo.config")
        config.skip_nnmodule_hook_guards = False


def _may_call_a_norm_itself(module: torch.nn.Module) -> bool:
    """Whether hooks are needed.

    LayerNorm's own forward looks at the mark, and the other modules of torch.nn call no norm but
    GroupNorm and RMSNorm. TorchScript compiles modules that have no hooks.
    """
    if "forward" in vars(module) or type(module).__name__ in ("GroupNorm", "RMSNorm"):
        return True
    home = getattr(type(module).forward, "__module__", None) or ""
    return not home.startswith(("torch.nn.", "torch.jit.", "lpln_autopatch."))


class ByName:
    """Marks modules whose name ends as one of `patterns` says, when one becomes part of another.

    A name is known as soon as a module is registered in another, in whatever order a model is put
    together: its own in its parent, that one's in the next, and so on. The end of the name is
    matched, because nothing says which module is the outermost.

    Args:
        patterns: Ends of names, as `named_modules` has them, with commas between them. In each
            component `*`, `?` and `[...]` are those of file names.

    Attributes:
        unmatched: The patterns that no module's name has matched so far.
    """

    def __init__(self, patterns: str) -> None:
        self._patterns = [
            # In front of an end it says nothing, as in "*.norm".
            pattern.removeprefix("*.").split(".")
            for pattern in map(str.strip, patterns.split(","))
            if pattern
        ]
        self.unmatched = {".".join(pattern) for pattern in self._patterns}
        # The parents of each module, and its name in each.
        self._parents: MutableMapping[
            torch.nn.Module, list[tuple[weakref.ref[torch.nn.Module], str]]
        ] = weakref.WeakKeyDictionary()

    def install(self) -> Any:
        """Watch every registration from now on; the handle that is returned ends that."""
        return on_module_registration(self._register)

    def _register(self, parent: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        if module is None:
            return
        parents, entry = self._parents.setdefault(module, []), (weakref.ref(parent), name)
        if entry not in parents:
            parents.append(entry)
        is_inside = vars(parent).get(MARK) == BY_NAME
        for inner, submodule in module.named_modules():
            path = [name, *inner.split(".")] if inner else [name]
            matched = {".".join(p) for p in self._patterns if self._matches(p, path, parent)}
            self.unmatched -= matched
            if is_inside or matched:
                _mark_by_name(submodule, ".".join(path))

    def _matches(self, pattern: Sequence[str], path: list[str], parent: torch.nn.Module) -> bool:
        above = self._above(parent, len(pattern) - len(path))
        return any(_ends_as([*names, *path], pattern) for names in above)

    def _above(self, module: torch.nn.Module | None, count: int) -> Iterator[list[str]]:
        """The last `count` components of each name that `module`, if it is still there, has."""
        if count <= 0:
            yield []
        elif module is not None:
            for parent, name in self._parents.get(module, ()):
                yield from ([*names, name] for names in self._above(parent(), count - 1))


def _ends_as(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return all(map(fnmatchcase, path[-len(pattern) :], pattern))


def _mark_by_name(module: torch.nn.Module, name: str) -> None:
    if vars(module).get(MARK) == BY_NAME:
        return
    mark(module, BY_NAME)
    _logger.info("%s: %s is exempt", BY_NAME, name)


for _function in (is_marked, why_stock, run_stock, _enter, _leave):
    never_a_frame_of_its_own(_function)
