"""What the callbacks of a trainer share: a block for each training that they are in."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lpln_autopatch._activation import low_precision_layernorm
from lpln_autopatch._precision import Precision

if TYPE_CHECKING:
    import torch


class Blocks:
    """A `low_precision_layernorm` block for each training that is under way.

    It takes the arguments of `lpln_autopatch.enable`, and raises what that raises. One instance may
    be in several trainings at a time, nested or in threads. A copy, or what is unpickled, is in
    none.
    """

    def __init__(
        self,
        precision: str | Precision | torch.dtype,
        backend: str,
        norms: str | Iterable[str] | None,
    ) -> None:
        # An iterator can be read once, and each training reads them.
        norms = norms if norms is None or isinstance(norms, str) else list(norms)
        low_precision_layernorm(precision, backend, norms)  # raises now, not when one begins
        self._arguments = precision, backend, norms
        # By id: transformers' TrainerState has no hash.
        self._leave: dict[int, weakref.finalize[Any, Any]] = {}

    def __reduce__(self) -> tuple[type[Blocks], tuple[object, ...]]:
        return type(self), self._arguments

    def enter(self, training: object) -> None:
        """Enter the block of `training`; it is left when that is gone, if not before."""
        self.leave(training)
        entered = contextlib.ExitStack()
        entered.enter_context(low_precision_layernorm(*self._arguments))
        key = id(training)
        leave = weakref.finalize(training, _end, self._leave, key, entered)
        leave.atexit = False
        self._leave[key] = leave

    def leave(self, training: object) -> None:
        """Leave the block of `training`, if one is open."""
        leave = self._leave.get(id(training))
        if leave is not None:
            leave()


def _end(leave: dict[int, Any], key: int, entered: contextlib.ExitStack) -> None:
    """Forget a training that has ended or is gone, and leave its block."""
    leave.pop(key, None)
    entered.close()
