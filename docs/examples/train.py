"""Train a small GPT-style language model on the source code of the Python standard library.

    python train.py --steps 100
    python train.py --device cuda --dtype float16 --compile

Plain PyTorch: mixed precision by torch.autocast, and nothing that knows how LayerNorm runs. Needs
torch and tqdm. The progress goes to stderr; at the end a summary, a tab-separated line for each
figure, to stdout.
"""

import argparse
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

WARMUP_STEPS = 5  # not timed: allocation, and compilation with --compile


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then an MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def attend(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attend(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Predicts the next byte from those before it."""

    def __init__(self, width, layers, heads, context):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.apply(self.initialise)

    @staticmethod
    def initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits = self.head(self.final_norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def standard_library_text():
    """The bytes of every module in the top folder of the standard library, one after another."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def record_layernorm_dtypes(model):
    """A set that collects the dtypes of what the LayerNorms of `model` give."""
    dtypes = set()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    return dtypes


def bytes_saved_for_backward(model, loss_of_one_batch):
    """Bytes of the tensors that one forward keeps for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of_one_batch()
    del loss  # only now may storages be freed, and their addresses used again
    return sum(sizes.values())


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


class Training:
    """A new model, its optimizer, and the batches that it learns from."""

    def __init__(self, args, text):
        torch.manual_seed(args.seed)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.args, self.text = args, text
        self.model = LanguageModel(args.width, args.layers, args.heads, args.context)
        self.model.to(args.device)
        self.run_model = torch.compile(self.model) if args.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")

    def batch(self):
        """Tokens and the bytes that follow them, both (batch size, context), int64."""
        args = self.args
        starts = torch.randint(
            len(self.text) - args.context, (args.batch_size, 1), generator=self.generator
        )
        windows = self.text[starts + torch.arange(args.context + 1)].long().to(args.device)
        return windows[:, :-1], windows[:, 1:]

    def loss_of_one_batch(self):
        batch = self.batch()
        with torch.autocast(self.args.device, dtype=getattr(torch, self.args.dtype)):
            return self.run_model(*batch)

    def step(self):
        """Learn from one batch, and its loss."""
        loss = self.loss_of_one_batch()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=128, help="bytes that the model sees")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for name in ("batch_size", "context", "width", "layers", "heads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: from 1 on.")
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps {args.steps}: the first {WARMUP_STEPS} are not timed; take more.")
    return args


def main():
    args = parse_arguments()
    training = Training(args, standard_library_text())
    layernorm_dtypes = record_layernorm_dtypes(training.model)
    losses, seconds = [], []
    progress = tqdm(range(args.steps), unit="step")
    for step in progress:
        start = time.perf_counter()
        losses.append(training.step())
        synchronize(args.device)
        seconds.append(time.perf_counter() - start)
        if step % 10 == 0:
            progress.set_postfix(loss=f"{losses[-1].item():.3f}")

    # The median step: a busy machine slows some down.
    step_seconds = statistics.median(seconds[WARMUP_STEPS:])
    last = torch.stack(losses[-max(1, args.steps // 10) :])
    summary = {
        "LayerNorm output dtypes": ", ".join(sorted(map(str, layernorm_dtypes))),
        "final loss (mean of the last tenth)": f"{last.mean().item():.4f}",
        "tokens per second": f"{args.batch_size * args.context / step_seconds:,.0f}",
    }
    if args.device == "cuda":
        summary["peak CUDA memory, MiB"] = f"{torch.cuda.max_memory_allocated() / 2**20:,.1f}"
    saved = bytes_saved_for_backward(training.model, training.loss_of_one_batch)
    summary["saved for backward, MiB"] = f"{saved / 2**20:,.1f}"
    for name, value in summary.items():
        print(f"{name}\t{value}")


if __name__ == "__main__":
    main()
