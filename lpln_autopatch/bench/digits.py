"""A small ViT that learns scikit-learn's digits: images that a package ships."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from lpln_autopatch.bench.results import short


def digits(lr: float, steps: int, dtype: torch.dtype, seed: int) -> Any:
    """A ViT of two blocks that learns scikit-learn's 1797 digits, 8 x 8 pixels, on the CPU."""
    example: Any = import_module("lpln_autopatch.bench.example")
    data = import_module("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    args = example.parse_arguments(["--device", "cpu", "--steps", str(steps)])
    args.dtype = short(dtype)
    training = example.Training.__new__(example.Training)
    torch.manual_seed(seed)
    training.args, training.model = args, _ViT()
    training.generator = torch.Generator().manual_seed(seed)
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=lr)
    training.scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(labels), (64,), generator=training.generator)
        return images[chosen], labels[chosen]

    def loss_of_one_batch() -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return training.model(*batch())

    training.batch, training.loss_of_one_batch = batch, loss_of_one_batch
    return training


class _ViT(torch.nn.Module):
    """Patches of 2 x 2 pixels, pre-norm blocks, the mean over patches, ten classes: the loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(1, width, 2, 2)
        self.position = torch.nn.Parameter(0.02 * torch.randn(16, width))
        block = torch.nn.TransformerEncoderLayer
        self.blocks = torch.nn.Sequential(
            *(
                block(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(2)
            )
        )
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 10)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.patches(images[:, None]).flatten(2).transpose(1, 2) + self.position
        return F.cross_entropy(self.head(self.norm(self.blocks(x)).mean(1)), labels)
