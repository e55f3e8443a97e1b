"""Batches for models, and the losses of their outputs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

MAKE_BATCH = (
    "make_batch(self, items, length, device), a method that gives the arguments of its forward by "
    "name, such as {'x': torch.randn(items, 3, 224, 224, device=device)}"
)
"""The method that a model from elsewhere than timm and transformers needs, for messages."""


def batch_of(model: Any, items: int, length: int, device: str | torch.device) -> dict[str, Any]:
    """Return the arguments of the forward of `model`, by name."""
    if hasattr(model, "make_batch"):
        own: dict[str, Any] = model.make_batch(items, length, device)
        return own

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(2, shape, device=device)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    config = getattr(model, "config", None)
    if config is None:  # a model of timm
        argument = next(iter(inspect.signature(model.forward).parameters))
        return {argument: numbers(items, *model.pretrained_cfg["input_size"])}
    vision: Any = getattr(config, "vision_config", config)
    side: Any = getattr(vision, "image_size", None)
    images: Any = (items, getattr(vision, "num_channels", 3), side, side)
    if vision is not config:  # CLIP
        tokens = integers(items, config.text_config.max_position_embeddings)
        return {"input_ids": tokens, "pixel_values": numbers(*images), "return_loss": True}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": numbers(*images), "labels": integers(items)}
    if model.main_input_name == "input_features":  # Whisper: 30 s
        sound = numbers(items, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": sound, "labels": integers(items, length)}
    return {"input_ids": integers(items, length), "labels": integers(items, length)}


def why_not_fed(model: Any) -> str | None:
    """Return the reason, in a line, why no batch can be made for `model`, or None."""
    own = hasattr(model, "make_batch")
    if not own and not hasattr(model, "config") and not hasattr(model, "pretrained_cfg"):
        return f"{type(model).__name__} has no {MAKE_BATCH}"
    try:
        batch_of(model, 1, 1, "meta")
    except Exception as error:  # the user's code may raise anything
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        if own:
            return f"its make_batch fails: {why}"
        return f"its inputs cannot be made ({why}); give it {MAKE_BATCH}"
    return None


def loss_of(output: Any) -> torch.Tensor:
    """Return the loss in a model's `output`, or a loss of classes or of a regression from it."""
    loss: torch.Tensor | None = getattr(output, "loss", None)
    if loss is not None:
        return loss
    y = output if isinstance(output, torch.Tensor) else output[0]
    if y.ndim == 2:
        return F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long, device=y.device))
    return F.mse_loss(y, torch.zeros_like(y))
