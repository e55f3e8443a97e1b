"""Activation checkpointing: a recomputation runs under the request that its forward ran under."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lpln_autopatch._request import Request
from lpln_autopatch._torch_compat import CHECKPOINT_ENTRIES, CHECKPOINT_RECOMPUTATIONS
from lpln_autopatch.backends.cpu import repeated

Scope = Callable[[Request | None], AbstractContextManager[Any]]
"""Makes a context in which a request is active, or nothing if it is None."""


@dataclasses.dataclass(frozen=True)
class Carried:
    """A checkpointed function, bound to the request that was active at its forward.

    A recomputation must repeat its forward. It may happen after the block of the forward has
    closed, or after the base was cleared.
    """

    function: Callable[..., Any]
    request: Request | None
    scope: Scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Even if the request is active already: its block may close before this ends.
        before, repeated.now = repeated.now, True
        try:
            with self.scope(self.request):
                return self.function(*args, **kwargs)
        finally:
            repeated.now = before


def replacements(
    active: Callable[[], Request | None], scope: Scope
) -> dict[str, Callable[[Any], Callable[..., Any]]]:
    """Return a maker of the replacement of each function of `torch.utils.checkpoint`, by its path.

    A checkpointed function passes two replaced functions. The first takes it at the forward, and
    gets a `Carried` instead. The second runs it in backward. If it is no `Carried`, its forward ran
    before the first activation, and it is recomputed stock.

    Args:
        active: Returns the request that is active in this thread.
        scope: Makes the context of a recomputation.
    """

    def carries(position: int, original: Any, /, *args: Any, **kwargs: Any) -> Any:
        function = Carried(args[position], active(), scope)
        return original(*args[:position], function, *args[position + 1 :], **kwargs)

    def recomputes(attribute: str, original: Any, holder: Any, /, *args: Any, **kwargs: Any) -> Any:
        function = getattr(holder, attribute)
        if not isinstance(function, Carried):
            setattr(holder, attribute, Carried(function, None, scope))
        return original(holder, *args, **kwargs)

    # partial(partial, carries, 1)(original) is partial(carries, 1, original).
    maker = functools.partial
    return {
        **{path: maker(maker, carries, at) for path, at in CHECKPOINT_ENTRIES.items()},
        **{path: maker(maker, recomputes, at) for path, at in CHECKPOINT_RECOMPUTATIONS.items()},
    }
