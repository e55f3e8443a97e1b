"""The trainings of `loss`: docs/examples/train.py, models of transformers, a ViT on digits."""

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
    """Run docs/examples/train.py, which lies beside this file in a wheel; return its names."""
    here = Path(__file__).parent
    files = (here / "train.py", here.parents[1] / "docs" / "examples" / "train.py")
    return SimpleNamespace(**runpy.run_path(str(next(file for file in files if file.exists()))))


def digits(lr: float, steps: int, dtype: torch.dtype, seed: int) -> Any:
    """Return the training of a ViT of two blocks on scikit-learn's 1797 digits of 8 x 8 pixels."""
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


def causal_lm(config: str, lr: float, steps: int, dtype: torch.dtype, seed: int) -> Any:
    """Return the training of a transformers model of two blocks on the text of the example."""
    text = example().standard_library_text()

    class Training(example().Training):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.manual_seed(seed)
            self.args = SimpleNamespace(device="cpu", dtype=short(dtype), steps=steps)
            self.args.context, self.args.batch_size = 64, 8
            self.text = text
            self.model = self.run_model = _CausalLM(config)
            self.generator = torch.Generator().manual_seed(seed)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
            self.scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)

    return Training()


class _CausalLM(torch.nn.Module):
    """A transformers model that predicts the next byte, and returns the loss."""

    def __init__(self, config: str, width: int = 64) -> None:
        super().__init__()
        transformers: Any = import_module("transformers")
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256}
        configuration = getattr(transformers, config)(**sizes, pad_token_id=None, use_cache=False)
        self.model = transformers.AutoModelForCausalLM.from_config(configuration)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _ViT(torch.nn.Module):
    """Patches of 2 x 2 pixels, pre-norm blocks, the mean over patches, ten classes, the loss."""

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
