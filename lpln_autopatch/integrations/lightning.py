"""Lightning: a callback that lowers norms while its Trainer fits."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lpln_autopatch._precision import Precision
from lpln_autopatch.integrations.blocks import Blocks

if TYPE_CHECKING:
    import torch


def _callback_classes() -> list[type]:
    """Return the class `Callback` of each installed Lightning.

    `lightning` and `pytorch_lightning` are two copies, and each takes callbacks of its own class
    only. Installing `lightning` brings both.
    """
    classes, reasons = [], []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            classes.append(import_module(name).Callback)
        except ImportError as error:
            reasons.append(str(error))
    if not classes:
        raise ImportError(
            f"lpln_autopatch.integrations.lightning needs Lightning, and {', '.join(reasons)}. "
            "Install it: pip install lightning."
        )
    return classes


class LowPrecisionLayerNorm(*_callback_classes()):  # type: ignore[misc]
    """Lower LayerNorm while the Trainer fits, validation inside it included.

    `Trainer(precision="bf16-mixed", callbacks=[LowPrecisionLayerNorm()])`. Autocast is the
    Trainer's: with a precision that is not mixed nothing is lowered. `validate`, `test` and
    `predict` run as they would without the callback. Each `fit` is a `low_precision_layernorm`
    block, left when `fit` ends or raises. Checkpoints have nothing of it.

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
        super().__init__()
        self._blocks = Blocks(precision, backend, norms)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Enter the block where `fit` begins."""
        if stage == "fit":
            self._blocks.enter(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the block where `fit` ends, also if another callback's on_exception has failed."""
        self._blocks.leave(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the block where `fit` is interrupted: Lightning does not call teardown then."""
        self._blocks.leave(trainer)
