"""Hugging Face transformers: a callback that lowers norms while its Trainer trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"lpln_autopatch.integrations.transformers needs Hugging Face transformers, and {error}. "
        "Install it: pip install transformers accelerate."
    ) from error

from lpln_autopatch._precision import Precision
from lpln_autopatch.integrations.blocks import Blocks

if TYPE_CHECKING:
    import torch


class LowPrecisionLayerNorm(TrainerCallback):  # type: ignore[misc]
    """Lower LayerNorm while the Trainer trains, evaluation inside it included.

    `Trainer(args=TrainingArguments(bf16=True), callbacks=[LowPrecisionLayerNorm()])`. Autocast is
    the Trainer's: without `bf16` or `fp16` nothing is lowered. `evaluate` and `predict` run as they
    would without the callback. Each `train` is a `low_precision_layernorm` block, left when `train`
    ends.

    The Trainer tells callbacks nothing if `train` raises. The block then stays open until the
    Trainer's next `train` begins or the Trainer is freed. If your program goes on after such an
    error, put `low_precision_layernorm` around `train` instead.

    Args:
        precision: As for `lpln_autopatch.enable`.
        backend: As for `lpln_autopatch.enable`.
        norms: As for `lpln_autopatch.enable`.

    Raises:
        ValueError: precision, backend or norms is not a valid name.
        ImportError: the backend cannot be used here.
    """

    def __init__(
        self,
        precision: str | Precision | torch.dtype = "amp",
        backend: str = "auto",
        norms: str | Iterable[str] | None = None,
    ) -> None:
        self._blocks = Blocks(precision, backend, norms)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter the block of this `train`, which has made `state` for itself."""
        self._blocks.enter(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the block of this `train`."""
        self._blocks.leave(state)
