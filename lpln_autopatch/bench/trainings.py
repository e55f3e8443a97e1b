"""What `loss` trains: docs/examples/train.py, and a small ViT on scikit-learn's digits."""

from __future__ import annotations

import functools
import runpy
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from lpln_autopatch.bench.results import short


@functools.cache
def example() -> Any:
    """The names of docs/examples/train.py, which lies beside this file in the wheel."""
    here = Path(__file__).parent
    files = (here / "train.py", here.parents[1] / "docs" / "examples" / "train.py")
    return SimpleNamespace(**runpy.run_path(str(next(file for file in files if file.exists()))))


def digits(lr: float, steps: int, dtype: torch.dtype, seed: int) -> Any:
    """A ViT of two blocks that learns scikit-learn's 1797 digits, 8 x 8 pixels, on the CPU."""
    data = import_module("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)

    class Training(example().Training):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.manual_seed(seed)
            self.args = SimpleNamespace(device="cpu", dtype=short(dtype), steps=steps)
            self.model = self.run_model = _ViT()
            self.generator = torch.Generator().manual_seed(seed)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
            self.scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)

        def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = torch.randint(len(labels), (64,), generator=self.generator)
            return images[chosen], labels[chosen]

    return Training()


class _ViT(torch.nn.Module):
    """Patches of 2 x 2 pixels, pre-norm blocks, the mean over patches, ten classes: the loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(1, width, 2, 2)
        self.position = torch.nn.Parameter(0.02 * torch.randn(16, width))
        block = torch.nn.TransformerEncoderLayer
        self.blocks = torch.nn.Sequential(
            *(block(width, 4, 4 * width, 0.0, "gelu", 1e-5, True, True) for _ in range(2))
        )
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 10)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.patches(images[:, None]).flatten(2).transpose(1, 2) + self.position
        return F.cross_entropy(self.head(self.norm(self.blocks(x)).mean(1)), labels)
