"""MosaicML Composer: our surgery as an algorithm of its Trainer."""

from __future__ import annotations

import functools
from typing import Any

try:
    from composer.algorithms import LowPrecisionLayerNorm as ComposersOwn
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
except ImportError as error:
    raise ImportError(
        f"lpln_autopatch.integrations.composer needs MosaicML Composer, and {error}. "
        "Install it: pip install mosaicml."
    ) from error

from lpln_autopatch.surgery import apply_low_precision_layernorm


def LowPrecisionLayerNorm(apply_at: Event = Event.INIT, backend: str = "auto") -> Algorithm:
    """Lower the LayerNorms of the model that the Trainer trains.

    Replaces Composer's algorithm of the same name in `Trainer(algorithms=[...])`. The precision is
    the Trainer's; "amp_fp16" and "amp_bf16" have an effect.

    A checkpoint has the name of an algorithm, and not whose it is. Where one that was saved with
    either is loaded, the Trainer's own stays, Composer's or this. A Trainer that has neither gets
    Composer's, and Composer says so.

    Args:
        apply_at: When to do it: `Event.INIT`, `Event.BEFORE_LOAD` or `Event.AFTER_LOAD`.
        backend: As for `lpln_autopatch.enable`.

    Returns:
        Composer's algorithm, which does this instead: Composer looks for the class of an algorithm
        when it loads a checkpoint, and when it sorts algorithms.

    Raises:
        ValueError: `apply_at` is another event; or, when it is applied, there is no such backend,
            or the Trainer has Composer's too.

    Source:
        MosaicML Composer, `LowPrecisionLayerNorm`; differs in: `backend`, and the modules stay the
        same objects.
    """
    valid = (Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD)
    if apply_at not in valid:
        names = ", ".join(f"Event.{event.name}" for event in valid)
        raise ValueError(f"apply_at={apply_at!r} is not supported. Valid: {names}.")
    algorithm: Algorithm = ComposersOwn(apply_at)
    algorithm.apply = functools.partial(_apply, backend)
    return algorithm


def _apply(backend: str, event: Event, state: State, logger: Logger) -> None:
    """Lower the LayerNorms of `state.model`, for `state.precision`."""
    del event, logger
    for other in state.algorithms:
        if isinstance(other, ComposersOwn) and "apply" not in vars(other):
            raise ValueError(
                f"The Trainer has ours and Composer's own LowPrecisionLayerNorm, {other}, "
                "which would replace the modules that ours has changed. Keep one of them."
            )
    arguments: dict[str, Any] = {"precision": state.precision, "optimizers": state.optimizers}
    apply_low_precision_layernorm(state.model, backend=backend, **arguments)
