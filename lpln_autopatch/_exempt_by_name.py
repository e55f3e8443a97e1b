"""LPLN_EXEMPT: exempt modules by their names as soon as they become part of a model."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import wrapt
from torch import nn

from lpln_autopatch._exemption import BY_NAME, MARK, mark
from lpln_autopatch._torch_compat import on_module_registration

# In a name these say only that the module was wrapped: by torch.compile, checkpoint_wrapper, FSDP 1
# or DistributedDataParallel.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")

_logger = logging.getLogger("lpln_autopatch")


class ByName:
    """Mark a module when it becomes part of another, if its name ends with one of `patterns`.

    The name of a module grows from the inside out: first its name in its parent, then the parent's
    in the next one. So its end is matched: nothing tells which module is the outermost.

    Args:
        patterns: Ends of names, as `named_modules` has them, with commas between them. In each
            component `*`, `?` and `[...]` are those of file names. A component may be the name of
            the module's class, or of a base of that, instead.

    Attributes:
        unmatched: The patterns that no module has matched so far.
    """

    def __init__(self, patterns: str) -> None:
        self._patterns = [
            # Only the end is matched: a "*." in front of it adds nothing.
            pattern.removeprefix("*.").split(".")
            for pattern in map(str.strip, patterns.split(","))
            if pattern
        ]
        self.unmatched = {".".join(pattern) for pattern in self._patterns}
        # The parents of each module, and its name in each.
        self._parents: MutableMapping[nn.Module, list[tuple[weakref.ref[nn.Module], str]]]
        self._parents = weakref.WeakKeyDictionary()

    def install(self) -> contextlib.ExitStack:
        """Watch every registration until the returned stack is closed."""
        stack = contextlib.ExitStack()
        stack.callback(on_module_registration(self._register).remove)
        # Their `insert` writes into `_modules`, and calls no registration hook.
        for container in (nn.ModuleList, nn.Sequential):
            wrapper = wrapt.wrap_object(container, "insert", wrapt.FunctionWrapper, (self._insert,))
            stack.callback(wrapt.unwrap_object, container, "insert", wrapper)
        return stack

    def _insert(
        self, insert: Callable[..., Any], container: nn.Module, args: Any, named: Any
    ) -> Any:
        before = set(container.children())
        result = insert(*args, **named)
        for name, module in container.named_children():
            if module not in before:
                self._register(container, name, module)
        return result

    def _register(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is None:
            return
        parents, entry = self._parents.setdefault(module, []), (weakref.ref(parent), name)
        if entry not in parents:
            parents.append(entry)
        # The outermost module has no name, and a class all the same.
        self._mark_if_it_matches(parent, type(parent).__name__)
        is_inside = vars(parent).get(MARK) == BY_NAME
        for inner, submodule in module.named_modules():
            path = f"{name}.{inner}" if inner else name
            self._mark_if_it_matches(submodule, path)
            if is_inside:
                _mark_by_name(submodule, path)

    def _mark_if_it_matches(self, module: nn.Module, name: str) -> None:
        matched = {".".join(p) for p in self._patterns if self._matches(module, p)}
        self.unmatched -= matched
        if matched:
            _mark_by_name(module, name)

    def _matches(self, module: nn.Module, pattern: Sequence[str]) -> bool:
        """Return True if a name of `module` ends with `pattern`."""
        *above, last = pattern
        is_of_class = any(cls.__name__ == last for cls in type(module).__mro__)
        if is_of_class and not above:
            return True
        for reference, name in self._parents.get(module, ()):
            parent = reference()
            is_named = is_of_class or fnmatchcase(name, last)
            if is_named and (not above or (parent is not None and self._matches(parent, above))):
                return True
            if name in _WRAPPERS and parent is not None and self._matches(parent, pattern):
                return True
        return False


def _mark_by_name(module: nn.Module, name: str) -> None:
    if vars(module).get(MARK) == BY_NAME:
        return
    mark(module, BY_NAME)
    if MARK in vars(module):
        _logger.info("%s: %s is exempt", BY_NAME, name)
