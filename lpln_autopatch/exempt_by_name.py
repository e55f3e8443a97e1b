"""LPLN_EXEMPT: modules are exempt by their names, from the moment they become part of a model."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from lpln_autopatch import exemption
from lpln_autopatch.torch_compat import on_module_registration

_logger = logging.getLogger("lpln_autopatch")

BY_NAME = "LPLN_EXEMPT"
"""The mark of a module that is exempt by its name: modules that are added to it inherit it."""


class ByName:
    """Marks modules whose name ends as one of `patterns` says, when one becomes part of another.

    A name is known as soon as a module is registered in another, in whatever order a model is put
    together: its own in its parent, that one's in the next, and so on. The end of the name is
    matched, because nothing says which module is the outermost.

    Args:
        patterns: Ends of names, as `named_modules` has them, with commas between them. In each
            component `*`, `?` and `[...]` are those of file names.
    """

    def __init__(self, patterns: str) -> None:
        self._patterns = [
            # In front of an end it says nothing, as in "*.norm".
            pattern.removeprefix("*.").split(".")
            for pattern in map(str.strip, patterns.split(","))
            if pattern
        ]
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
        if vars(parent).get(exemption.MARK) == BY_NAME:
            _mark(module, name)
            return
        for inner, submodule in module.named_modules():
            path = [name, *inner.split(".")] if inner else [name]
            if any(self._matches(pattern, path, parent) for pattern in self._patterns):
                _mark(submodule, ".".join(path))

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


def _mark(module: torch.nn.Module, name: str) -> None:
    if vars(module).get(exemption.MARK) == BY_NAME:
        return
    exemption.mark(module, BY_NAME)
    _logger.info("%s: %s is exempt", BY_NAME, name)
