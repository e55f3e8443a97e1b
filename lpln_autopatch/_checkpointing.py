"""Activation checkpointing: a recomputation runs under the request that its forward ran under."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lpln_autopatch._torch_compat import CHECKPOINT_ENTRIES, CHECKPOINT_RECOMPUTATIONS
from lpln_autopatch.backends.cpu import repeated

Block = Callable[[], AbstractContextManager[Any]]
"""What opens a block of the request that was in force when it was made."""


@dataclasses.dataclass(frozen=True)
class Carried:
    """A function that runs under the request that was in force elsewhere, or under none.

    A recomputation must repeat its forward, and may happen outside the block that the forward ran
    in, or after the base was cleared.
    """

    function: Callable[..., Any]
    block: Block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Even if that is in force already: what it is in force by may end before this does.
        before, repeated.now = repeated.now, True
        try:
            with self.block():
                return self.function(*args, **kwargs)
        finally:
            repeated.now = before


def replacements(
    capture: Callable[[], Block], stock: Block
) -> dict[str, Callable[[Any], Callable[..., Any]]]:
    """Return what makes the replacement of each function of `torch.utils.checkpoint`, by its path.

    `capture` gives a block of what is active now; `stock` is one in which nothing is.
    """
    return {
        **{path: _captures(at, capture) for path, at in CHECKPOINT_ENTRIES.items()},
        **{path: _recomputes(name, stock) for path, name in CHECKPOINT_RECOMPUTATIONS.items()},
    }


def _captures(position: int, capture: Callable[[], Block]) -> Callable[[Any], Callable[..., Any]]:
    """Bind the function at `position`, run again in backward, to what is active now."""

    def replacement(original: Any, /, *args: Any, **kwargs: Any) -> Any:
        function = Carried(args[position], capture())
        return original(*args[:position], function, *args[position + 1 :], **kwargs)

    return lambda original: functools.partial(replacement, original)


def _recomputes(attribute: str, stock: Block) -> Callable[[Any], Callable[..., Any]]:
    """Before `attribute` is run again: stock, if its forward was before our time."""

    def replacement(original: Any, holder: Any, /, *args: Any, **kwargs: Any) -> Any:
        function = getattr(holder, attribute)
        if not isinstance(function, Carried):
            setattr(holder, attribute, Carried(function, stock))
        return original(holder, *args, **kwargs)

    return lambda original: functools.partial(replacement, original)
