"""MosaicML Composer: our surgery as an algorithm of its Trainer."""

from __future__ import annotations

from typing import Any

try:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
except ImportError as error:
    raise ImportError(
        f"lpln_autopatch.integrations.composer needs MosaicML Composer, and {error}. "
        "Install it: pip install mosaicml."
    ) from error

from lpln_autopatch.surgery import apply_low_precision_layernorm


class LowPrecisionLayerNorm(Algorithm):  # type: ignore[misc]
    """Lower the LayerNorms of the model that the Trainer trains.

    Replaces Composer's algorithm of the same name in `Trainer(algorithms=[...])`. The precision is
    the Trainer's; "amp_fp16" and "amp_bf16" have an effect.

    Args:
        apply_at: When to do it: `Event.INIT`, `Event.BEFORE_LOAD` or `Event.AFTER_LOAD`.
        backend: As for `lpln_autopatch.enable`.

    Raises:
        ValueError: `apply_at` is another event, or, when it is applied, there is no such backend.

    Source:
        MosaicML Composer, `LowPrecisionLayerNorm`; differs in: `backend`, and the modules stay the
        same objects.
    """

    def __init__(self, apply_at: Event = Event.INIT, backend: str = "auto") -> None:
        valid = (Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD)
        if apply_at not in valid:
            names = ", ".join(f"Event.{event.name}" for event in valid)
            raise ValueError(f"apply_at={apply_at!r} is not supported. Valid: {names}.")
        self.apply_at = apply_at
        self.backend = backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}(apply_at={self.apply_at}, backend={self.backend!r})"

    @staticmethod
    def required_on_load() -> bool:
        """Whether Composer adds it where a checkpoint was trained with it: as its own, yes."""
        return True

    def match(self, event: Event, state: State) -> bool:
        """Whether `event` is the one at which to do it."""
        del state
        return bool(event == self.apply_at)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Lower the LayerNorms of `state.model`, for `state.precision`."""
        del event, logger
        arguments: dict[str, Any] = {"precision": state.precision, "optimizers": state.optimizers}
        apply_low_precision_layernorm(state.model, backend=self.backend, **arguments)
