"""Builders of the zoo's models that need more than a configuration, each with its batches."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch


def dit_xl_2(**config: Any) -> torch.nn.Module:
    """Return DiT-XL/2 of diffusers, on latents of 256 x 256 pixels."""
    sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
    sizes |= {"in_channels": 4, "out_channels": 8, "sample_size": 32, **config}
    model: Any = import_module("diffusers").DiTTransformer2DModel(**sizes)

    def make_batch(items: int, length: int, device: str) -> dict[str, Any]:
        latents = torch.randn(items, 4, 32, 32, device=device)
        numbers = torch.randint(1000, (items,), device=device)
        return {"hidden_states": latents, "timestep": numbers, "class_labels": numbers}

    model.make_batch = make_batch
    result: torch.nn.Module = model
    return result


def stable_diffusion_unet(**config: Any) -> torch.nn.Module:
    """Return the UNet of Stable Diffusion 1.5, on latents of 512 x 512 pixels and 77 tokens."""
    sizes = {"sample_size": 64, "cross_attention_dim": 768, **config}
    model: Any = import_module("diffusers").UNet2DConditionModel(**sizes)

    def make_batch(items: int, length: int, device: str) -> dict[str, Any]:
        latents = torch.randn(items, 4, 64, 64, device=device)
        numbers = torch.randint(1000, (items,), device=device)
        text = torch.randn(items, 77, 768, device=device)
        return {"sample": latents, "timestep": numbers, "encoder_hidden_states": text}

    model.make_batch = make_batch
    result: torch.nn.Module = model
    return result


def sam2_memory_encoder(**config: Any) -> torch.nn.Module:
    """Return the memory encoder of SAM 2, on 64 x 64 features and masks of 1024 x 1024 pixels."""
    video: Any = import_module("transformers.models.sam2_video.modeling_sam2_video")
    configuration = import_module("transformers").Sam2VideoConfig(**config)
    model: Any = video.Sam2VideoMemoryEncoder(configuration)

    def make_batch(items: int, length: int, device: str) -> dict[str, Any]:
        features = torch.randn(items, configuration.memory_encoder_hidden_size, 64, 64)
        masks = torch.randn(items, 1, 1024, 1024, device=device)
        return {"vision_features": features.to(device), "masks": masks}

    model.make_batch = make_batch
    result: torch.nn.Module = model
    return result


class _Pairs(torch.nn.Module):
    """A CLIP that gives the similarity of each image and each text, so that both are trained."""

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        of_images, of_texts, scale, *_ = self.clip(image, text)
        similarity: torch.Tensor = scale * of_images @ of_texts.T
        return similarity


def open_clip_vit_b_32(**config: Any) -> torch.nn.Module:
    """Return CLIP ViT-B/32 of open_clip, whose LayerNorm casts back to the dtype of its input."""
    options = {"device": torch.get_default_device(), **config}
    model: Any = _Pairs(import_module("open_clip").create_model("ViT-B-32", **options))

    def make_batch(items: int, length: int, device: str) -> dict[str, Any]:
        tokens = torch.randint(49408, (items, 77), device=device)
        return {"image": torch.randn(items, 3, 224, 224, device=device), "text": tokens}

    model.make_batch = make_batch
    result: torch.nn.Module = model
    return result
