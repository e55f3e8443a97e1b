"""Blocks of a trainer's callback: one for each training that the callback is in."""

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

    It takes the arguments of `lpln_autopatch.enable`, and raises the same errors. One instance may
    be in several trainings at a time, nested or in threads. Copies and unpickled instances are in
    none.
    """

    def __init__(
        self,
        precision: str | Precision | torch.dtype,
        backend: str,
        norms: str | Iterable[str] | None,
    ) -> None:
        # Each training reads the norms, and an iterator can be read only once.
        norms = norms if norms is None or isinstance(norms, str) else list(norms)
        low_precision_layernorm(precision, backend, norms)  # raises here, and not in a training
        self._arguments = precision, backend, norms
        # By id: transformers' TrainerState has no hash.
        self._leave: dict[int, weakref.finalize[Any, Any]] = {}

    def __reduce__(self) -> tuple[type[Blocks], tuple[object, ...]]:
        return type(self), self._arguments

    def enter(self, training: object) -> None:
        """Enter a block for `training`; it is left at the latest when `training` is freed."""
        self.leave(training)
        entered = contextlib.ExitStack()
        entered.enter_context(low_precision_layernorm(*self._arguments))
        key = id(training)
        leave = weakref.finalize(training, _end, self._leave, key, entered)
        leave.atexit = False
        self._leave[key] = leave

    def leave(self, training: object) -> None:
        """Leave the block of `training`, if it is open."""
        leave = self._leave.get(id(training))
        if leave is not None:
            leave()


def _end(leave: dict[int, Any], key: int, entered: contextlib.ExitStack) -> None:
    """Forget a training that has ended or was freed, and leave its block."""
    leave.pop(key, None)
    entered.close()
