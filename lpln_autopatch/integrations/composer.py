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

    Checkpoints are interchangeable with those of Composer's algorithm: a checkpoint has the name
    alone. A Trainer that loads one keeps its own algorithm, this or Composer's. A Trainer that has
    neither gets Composer's, and Composer says so.

    Args:
        apply_at: The event at which to lower: `INIT`, `BEFORE_LOAD` or `AFTER_LOAD` of `Event`.
        backend: As for `lpln_autopatch.enable`.

    Returns:
        An instance of Composer's own class with another `apply`, because Composer looks for that
        class when it loads a checkpoint, and when it sorts algorithms.

    Raises:
        ValueError: `apply_at` is another event; or, at that event, the backend is not a valid name,
            or the Trainer also has Composer's algorithm.

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
    """Lower the LayerNorms of `state.model` by `state.precision`."""
    del event, logger
    for other in state.algorithms:
        if isinstance(other, ComposersOwn) and "apply" not in vars(other):
            raise ValueError(
                f"The Trainer has ours and Composer's own LowPrecisionLayerNorm, {other}, "
                "which would replace the modules that ours has changed. Keep one of them."
            )
    arguments: dict[str, Any] = {"precision": state.precision, "optimizers": state.optimizers}
    apply_low_precision_layernorm(state.model, backend=backend, **arguments)
