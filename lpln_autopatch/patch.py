"""What is patched, and how it is put on and taken off. The only file that patches anything."""

from __future__ import annotations

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
)


@dataclasses.dataclass(frozen=True)
class _Patch:
    """A function that is wrapped while a precision is, or may soon be, active.

    Attributes:
        module: Where its path begins.
        path: Its name there, dotted.
        factory: Makes the wrapper from the function.
        wrappers: Those of ours that are on. More than one only if another patcher hid ours.
    """

    module: ModuleType
    path: str
    factory: Callable[[Any], Any]
    wrappers: list[Any] = dataclasses.field(default_factory=list)

    def install(self) -> bool:
        """Put the wrapper on, and say whether that was necessary."""
        if any(wrapt.is_wrapped_by(self._outermost(), wrapper) for wrapper in self.wrappers):
            return False
        # None of ours is in sight: never put on, overwritten, or beneath somebody's closure,
        # where it cannot be told from overwritten. One above that closure is right in each case.
        # wrapt's annotation asks for a proxy; its documentation for "a new object".
        wrapper = wrapt.wrap_object(self.module, self.path, self.factory)  # type: ignore[arg-type]
        self.wrappers.append(wrapper)
        return True

    def remove(self) -> None:
        """Take the wrapper off, or leave it where somebody else has wrapped it."""
        for wrapper in reversed(self.wrappers[:]):
            try:
                wrapt.unwrap_object(self.module, self.path, wrapper)
            except (wrapt.WrapperNotFoundError, wrapt.WrapperNotOutermostError):
                if not self._is_overwritten(wrapper):
                    self._warn_left_behind()
                    continue
            self.wrappers.remove(wrapper)

    def is_on(self) -> bool:
        return not all(map(self._is_overwritten, self.wrappers))

    def _outermost(self) -> Any:
        return wrapt.resolve_path(self.module, self.path)[2]

    def _is_overwritten(self, wrapper: Any) -> bool:
        """Whether somebody put back what was there before us."""
        chain = list(wrapt.wrapper_chain(self._outermost()))
        return any(link is wrapper.__wrapped__ for link in chain) and not any(
            link is wrapper for link in chain
        )

    def _warn_left_behind(self) -> None:
        warnings.warn(
            f"{self.module.__name__}.{self.path} was wrapped by {self._outermost()!r} after "
            "lpln_autopatch wrapped it. Our wrapper stays beneath that one, inert; remove that "
            "one first to have PyTorch's own function back.",
            RuntimeWarning,
            stacklevel=2,
        )


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


def install() -> None:
    """Put every wrapper on that is not on. If one cannot be put on, none is."""
    try:
        for patch in _CHECKPOINT:
            patch.install()
        if _LAYER_NORM.install():
            drop_compiled_code()
    except BaseException:
        remove()
        raise


def remove() -> None:
    """Take every wrapper off that is on."""
    for patch in (_LAYER_NORM, *_CHECKPOINT):
        patch.remove()


def is_installed() -> bool:
    """Whether our wrapper is on `LayerNorm.forward`, active or inert."""
    return _LAYER_NORM.is_on()
