"""A training step of BERT-base, GPT-2 124M and ViT-B/16, with random weights.

Forward, backward and AdamW, on one batch. Dropout is off, so that the step that is timed is the
step that has been checked. All contenders train the same model in turn.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from lpln_autopatch.bench import timing
from lpln_autopatch.bench.loss import example
from lpln_autopatch.bench.options import Options
from lpln_autopatch.bench.results import Figure, Row, ratios, short
from lpln_autopatch.bench.rivals import LOWERED, STOCK, Contender, composer, sift
from lpln_autopatch.bench.timing import Entry, Progress, Quartiles

MODES = ("eager", "compiled")
Built = tuple[torch.nn.Module, dict[str, torch.Tensor], int]
"""A model, a batch of its arguments, and how many tokens or images are in it."""
# Of all gradients together: stock, in bfloat16, is off by 0.011 at the 12 layers of ViT-B/16.
GRADIENT_LIMIT = 0.1


def bert(quick: bool, batch: int, length: int) -> Built:
    """BERT-base, masked language modelling."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2} if quick else {}
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    tokens = torch.randint(config.vocab_size, (batch, length))
    return BertForMaskedLM(config), {"input_ids": tokens, "labels": tokens}, tokens.numel()


def gpt2(quick: bool, batch: int, length: int) -> Built:
    """GPT-2 124M, language modelling."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 64, "n_head": 2} if quick else {}
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **sizes)
    tokens = torch.randint(config.vocab_size, (batch, length))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}, tokens.numel()


def vit(quick: bool, batch: int, length: int) -> Built:
    """ViT-B/16, classification of square images `length` pixels wide."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2} if quick else {}
    config = ViTConfig(image_size=length, num_labels=1000, **sizes)
    images = torch.randn(batch, 3, length, length)
    labels = torch.randint(1000, (batch,))
    return ViTForImageClassification(config), {"pixel_values": images, "labels": labels}, batch


# What builds it, what its items are called, and the batches: on an accelerator with 80 GB, on CPU.
MODELS = {
    "bert": (bert, "tokens", (32, 512), (2, 128)),
    "gpt2": (gpt2, "tokens", (16, 1024), (2, 128)),
    "vit": (vit, "images", (128, 224), (2, 224)),
}
QUICK = (2, 32)


class Training:
    """A model with its optimizer and one batch, and the step that is timed."""

    def __init__(self, name: str, mode: str, dtype: torch.dtype, options: Options) -> None:
        build, self.unit, *sizes = MODELS[name]
        self.device, self.dtype, self.mode = options.device, dtype, mode
        torch.manual_seed(0)
        size = QUICK if options.quick else sizes[options.device.type == "cpu"]
        self.model, tensors, self.items = build(options.quick, *size)
        self.model.to(self.device).train()
        self.batch = {key: value.to(self.device) for key, value in tensors.items()}
        self.run: Callable[..., Any] = self.model
        if mode == "compiled":
            self.run = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        enabled = dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)

    def loss(self) -> torch.Tensor:
        """The loss of the batch under autocast."""
        with torch.autocast(self.device.type, dtype=self.dtype):
            loss: torch.Tensor = self.run(**self.batch).loss
        return loss

    def step(self) -> None:
        """One training step."""
        torch.autograd.backward(self.scaler.scale(self.loss()))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def exact(self) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Loss and gradients in float64."""
        model = copy.deepcopy(self.model).double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in self.batch.items()}
        loss = model(**batch).loss
        torch.autograd.backward(loss)
        return loss.detach().double(), [p.grad for p in model.parameters()]

    def check(
        self, exact: tuple[torch.Tensor, list[torch.Tensor | None]], contender: Contender
    ) -> dict[str, Figure]:
        """Errors of the loss and of all gradients together, before any step.

        Raises:
            WrongResult: one is larger than the precision explains, or LayerNorms ran stock that
                should not.
        """
        figures: dict[str, Figure] = {}
        with contender.applied(self.model):
            figures["gives"] = contender.gives(self._layernorm_dtypes(), self.dtype)
            loss = self.loss()
            # Scaled, so that float16 does not lose the small ones; a power of two is exact.
            torch.autograd.backward(loss * 1024)
        pairs = [(p.grad, e) for p, e in zip(self.model.parameters(), exact[1], strict=True)]
        squares = [
            ((got.double() / 1024 - right).square().sum(), right.square().sum())
            for got, right in pairs
            if got is not None and right is not None
        ]
        self.optimizer.zero_grad()
        wrong, all_ = (torch.stack(column).sum().item() for column in zip(*squares, strict=True))
        errors = {
            "loss": timing.relative_error(loss, exact[0]),
            "gradients": (wrong / all_) ** 0.5,
        }
        timing.require(
            errors, {"loss": 4 * torch.finfo(self.dtype).eps, "gradients": GRADIENT_LIMIT}
        )
        return {**figures, **{f"error {name}": error for name, error in errors.items()}}

    def _layernorm_dtypes(self) -> set[torch.dtype]:
        run = self.run
        if self.mode == "compiled":
            # What Dynamo traces, in code of its own: the hooks are not to be in what is timed.
            self.run = torch.compile(self.model, backend="eager")
        dtypes: set[torch.dtype] = set()
        hooks = [
            module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
            for module in self.model.modules()
            if isinstance(module, torch.nn.LayerNorm)
        ]
        self.loss()
        for hook in hooks:
            hook.remove()
        self.run = run
        return dtypes

    def memory(self, contender: Contender) -> dict[str, Figure]:
        """Peak of a step on an accelerator; on CPU, in eager mode, what is saved for backward."""
        backend = getattr(torch, self.device.type)
        with contender.applied(self.model):
            if hasattr(backend, "max_memory_allocated"):
                self.step()
                backend.reset_peak_memory_stats()
                self.step()
                timing.synchronize(self.device)
                return {"peak MiB": backend.max_memory_allocated() / 2**20}
            if self.mode == "eager":
                saved = example().bytes_saved_for_backward(self.model, self.loss)
                return {"saved MiB": saved / 2**20}
        return {}


def run(options: Options, progress: Progress) -> list[Row]:
    """Measure a step of each model, in each mode."""
    dtypes = options.dtypes or [torch.bfloat16]
    cases = list(itertools.product(options.models or MODELS, options.modes or MODES, dtypes))
    progress.reset(len(cases) * _rounds(options))
    rows: list[Row] = []
    for name, mode, dtype in cases:
        progress.set_description_str(f"model, {name}, {mode}")
        torch.compiler.reset()
        rows += _measure(name, mode, dtype, options, progress)
    return rows


def _rounds(options: Options) -> int:
    return options.rounds_or(5 if options.device.type == "cpu" else 20)


def _measure(
    name: str, mode: str, dtype: torch.dtype, options: Options, progress: Progress
) -> list[Row]:
    device = options.device
    # Compiled code is PyTorch's own, whatever the backend.
    lowered = LOWERED if mode == "eager" else LOWERED[:1]
    contenders = (STOCK, *lowered, composer(device))
    case: dict[str, object] = {"model": name, "mode": mode, "autocast": short(dtype)}
    try:
        training = Training(name, mode, dtype, options)
    except ImportError as error:  # transformers wants a newer torch
        reason = " ".join(str(error).split())
        return [Row(case, contender.name, reason=reason) for contender in contenders]
    case["batch"] = len(training.batch["labels"])
    check = functools.partial(training.check, training.exact())
    passed, reasons = sift(contenders, device, check)
    del check  # and the float64 gradients with it
    entries = [
        Entry(c.name, functools.partial(c.applied, training.model), training.step) for c in passed
    ]
    rounds = _rounds(options)
    timing.interleave(entries, timing.device_seconds, device, rounds, progress)
    rows = [Row(case, contender.name, reason=reason) for contender, reason in reasons.items()]
    for contender, entry in zip(passed, entries, strict=True):
        figures: dict[str, Figure] = {}
        if device.type != "cpu":
            figures["ms"] = Quartiles.of([1e3 * each for each in entry.seconds])
            rate = training.items / statistics.median(entry.seconds)
            figures[f"{training.unit}/s"] = rate
        figures |= ratios(entry, entries, (STOCK.name, composer(device).name))
        figures |= training.memory(contender)
        rows.append(Row(case, contender.name, figures | passed[contender]))
    return rows
