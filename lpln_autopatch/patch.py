"""What is patched, and how it is put on and taken off. The only file that patches anything."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.utils.checkpoint
import wrapt

from lpln_autopatch import state
from lpln_autopatch.forward import lowering_forward
from lpln_autopatch.torch_compat import (
    CHECKPOINT_ENTRIES,
    CHECKPOINT_RECOMPUTATIONS,
    drop_compiled_code,
    watch_compilations,
)


@dataclasses.dataclass
class _Patch:
    """A function that is wrapped while a precision is, or may soon be, active.

    Attributes:
        module: Where its path begins.
        path: Its name there, dotted.
        factory: Makes the wrapper from the function.
        wrappers: Those of ours that are on. More than one only if another patcher hid ours.
        bottom: What was beneath everything when the first of them was put on.
    """

    module: ModuleType
    path: str
    factory: Callable[[Any], Any]
    wrappers: list[Any] = dataclasses.field(default_factory=list)
    bottom: Any = None

    def install(self) -> bool:
        """Put the wrapper on, and say whether that was necessary."""
        self._forget_what_is_gone()
        chain = self._chain()
        if any(_is_in(chain, wrapper) for wrapper in self.wrappers):
            return False
        # None of ours is in sight: never put on, or beneath somebody's closure. One above it.
        if not self.wrappers:
            self.bottom = chain[-1]
        # wrapt's annotation asks for a proxy; its documentation for "a new object".
        wrapper = wrapt.wrap_object(self.module, self.path, self.factory)  # type: ignore[arg-type]
        self.wrappers.append(wrapper)
        return True

    def remove(self) -> str | None:
        """Take the wrapper off, or leave it where somebody else has wrapped it, and say that."""
        for wrapper in reversed(self.wrappers[:]):
            with contextlib.suppress(wrapt.WrapperNotFoundError, wrapt.WrapperNotOutermostError):
                wrapt.unwrap_object(self.module, self.path, wrapper)
                self.wrappers = [w for w in self.wrappers if w is not wrapper]
        self._forget_what_is_gone()
        if not self.wrappers:
            return None
        return (
            f"{self.module.__name__}.{self.path} was wrapped by {self._chain()[0]!r} after "
            "lpln_autopatch wrapped it. Our wrapper stays beneath that one, inert; remove that "
            "one first to have PyTorch's own function back."
        )

    def is_on(self) -> bool:
        self._forget_what_is_gone()
        return bool(self.wrappers)

    def _chain(self) -> list[Any]:
        return list(wrapt.wrapper_chain(wrapt.resolve_path(self.module, self.path)[2]))

    def _forget_what_is_gone(self) -> None:
        """Forget the wrappers that somebody removed by putting back what was there before us.

        That is so if what was at the bottom is in sight and the wrapper is not. If neither is,
        somebody's closure hides both.
        """
        chain = self._chain()
        if _is_in(chain, self.bottom):
            self.wrappers = [wrapper for wrapper in self.wrappers if _is_in(chain, wrapper)]


def _is_in(chain: list[Any], wanted: Any) -> bool:
    # By identity: a wrapt proxy is equal to what it wraps.
    return any(link is wanted for link in chain)


def _captures_function(position: int) -> Callable[[Any], Any]:
    """A wrapper that binds the function at `position`, run again in backward, to now."""

    def wrapper(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = state.Carried(args[position], state.current())
        return wrapped(*args[:position], function, *args[position + 1 :], **kwargs)

    return lambda original: wrapt.FunctionWrapper(original, wrapper)


def _recomputes_function(attribute: str) -> Callable[[Any], Any]:
    """A wrapper for what runs `attribute` again, whose forward may have been before our time."""

    def wrapper(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        holder = args[0] if instance is None else instance
        function = getattr(holder, attribute)
        if not isinstance(function, state.Carried):
            setattr(holder, attribute, state.Carried(function, None))
        return wrapped(*args, **kwargs)

    return lambda original: wrapt.FunctionWrapper(original, wrapper)


# The module that defines LayerNorm: `torch.nn.LayerNorm` may be another class by now, and the
# instances made before that still run this one's forward.
_LAYER_NORM = _Patch(torch.nn.modules.normalization, "LayerNorm.forward", lowering_forward)

_CHECKPOINT = [
    *(
        _Patch(torch.utils.checkpoint, path, _captures_function(position))
        for path, position in CHECKPOINT_ENTRIES.items()
    ),
    *(
        _Patch(torch.utils.checkpoint, path, _recomputes_function(attribute))
        for path, attribute in CHECKPOINT_RECOMPUTATIONS.items()
    ),
]


# Asks whether anything may have been compiled since the wrapper was taken off.
_compiled_without: Callable[[], bool] | None = None


def install() -> None:
    """Put every wrapper on that is not on. If one cannot be put on, none is."""
    try:
        for patch in _CHECKPOINT:
            patch.install()
        # What was compiled without the wrapper does not look whether it is there. (What was
        # compiled with it does: then nothing is dropped, least of all in a recomputation.)
        if _LAYER_NORM.install() and (_compiled_without is None or _compiled_without()):
            drop_compiled_code()
    except BaseException:
        remove()
        raise


def remove(warn: bool = True) -> None:
    """Take every wrapper off that is on, and warn of those that somebody else has wrapped."""
    global _compiled_without
    was_on = _LAYER_NORM.is_on()
    left = [patch.remove() for patch in (_LAYER_NORM, *_CHECKPOINT)]
    if was_on and not _LAYER_NORM.is_on():
        _compiled_without = watch_compilations()
    # Last of all, for those who make errors of warnings.
    for message in filter(None, left if warn else ()):
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def is_installed() -> bool:
    """Whether our wrapper is on `LayerNorm.forward`, active or inert."""
    return _LAYER_NORM.is_on()
