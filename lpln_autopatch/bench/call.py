"""The cost of one LayerNorm call: stock, inert wrapper, lowered, Composer's recipe.

    python -m lpln_autopatch.bench.call [--device cuda] [--dtype float16] [--rounds 60]

Every contender is checked against float64 first. Then they are timed in turn, round after
round, in one process and on one thread; a ratio is the median of the rounds' own ratios. On an
accelerator the time is the host's, and the kernels of a call are counted with the profiler.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from lpln_autopatch import disable, low_precision_layernorm
from lpln_autopatch.bench.rivals import ComposerRecipe, refuse_to_run
from lpln_autopatch.torch_compat import CPU_TAKES_MIXED_DTYPES

SMALL, LARGE = (8, 64), (4096, 1024)
PAIRS = (("inert", "stock"), ("lowered", "stock"), ("lowered", "Composer's recipe"))


class _Stock(torch.nn.LayerNorm):
    # torch's own function, which this module sees before anything wraps it.
    forward = torch.nn.LayerNorm.forward


MODULES: dict[str, type[torch.nn.LayerNorm]] = {
    "stock": _Stock,
    "inert": torch.nn.LayerNorm,
    "lowered": torch.nn.LayerNorm,
    "Composer's recipe": ComposerRecipe,
}


class Contender:
    """One way of running a LayerNorm on one input, ready to be called."""

    def __init__(self, name: str, x: torch.Tensor, dtype: torch.dtype, backward: bool) -> None:
        self.name, self.x, self.dtype = name, x, dtype
        self.module = MODULES[name](x.shape[-1], device=x.device)
        self.call: Callable[[], object] = self._forward_and_backward if backward else self._forward
        self.upstream = torch.randn_like(self.in_context(self._forward))

    def in_context(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`function`'s result, under autocast and, for "lowered", in a block."""
        with torch.autocast(self.x.device.type, dtype=self.dtype):
            if self.name == "lowered":
                with low_precision_layernorm():
                    return function()
            return function()

    def _forward(self) -> torch.Tensor:
        y: torch.Tensor = self.module(self.x)
        return y

    def _forward_and_backward(self) -> object:
        inputs = (self.x, self.module.weight, self.module.bias)
        return torch.autograd.grad(self.module(self.x), inputs, self.upstream)

    def check(self) -> None:
        """Raise unless the output is LayerNorm's, to the precision of the autocast dtype."""
        y = self.in_context(self._forward).double()
        exact = torch.nn.functional.layer_norm(self.x.double(), (self.x.shape[-1],))
        error = ((y - exact).norm() / exact.norm()).item()
        if not error < 4 * torch.finfo(self.dtype).eps:
            raise RuntimeError(f"{self.name} is wrong: relative error {error:.2g}; not timed.")

    def seconds(self, calls: int) -> float:
        """Host seconds for one call, the mean over `calls`."""

        def run() -> torch.Tensor:
            self.call()
            start = time.perf_counter()
            for _ in range(calls):
                self.call()
            return torch.tensor(time.perf_counter() - start, dtype=torch.float64)

        elapsed = self.in_context(run).item() / calls
        if self.x.device.type != "cpu":
            torch.accelerator.synchronize()
        return elapsed

    def kernels(self) -> int:
        """Device kernels that one call launches."""

        def profiled() -> torch.Tensor:
            self.call()
            torch.accelerator.synchronize()
            with torch.profiler.profile() as profile:
                self.call()
                torch.accelerator.synchronize()
            events = profile.events() or ()
            return torch.tensor(sum("CPU" not in str(event.device_type) for event in events))

        return int(self.in_context(profiled).item())


def compare(
    shape: tuple[int, int], args: argparse.Namespace, input_dtype: torch.dtype, backward: bool
) -> None:
    """Check, time and print the contenders for one input."""
    x = torch.randn(shape, device=args.device, dtype=input_dtype, requires_grad=backward)
    contenders = [Contender(name, x, getattr(torch, args.dtype), backward) for name in MODULES]
    for contender in contenders:
        contender.check()
    # About 5 ms a turn, so that a turn is short against the machine's other business.
    calls = max(1, int(0.005 / max(c.seconds(3) for c in contenders)))
    rounds: list[dict[str, float]] = []
    for turn in range(args.rounds):
        shift = turn % len(contenders)
        order = contenders[shift:] + contenders[:shift]
        rounds.append({c.name: c.seconds(calls) for c in order})
    what = "forward and backward" if backward else "forward"
    print(f"{what}, {shape}, {input_dtype} input")
    for ours, rival in PAIRS:
        ratios = [r[ours] / r[rival] for r in rounds]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"  {ours + ' / ' + rival:32} {median:5.2f}   (quartiles {low:.2f} to {high:.2f})")
    if args.device != "cpu":
        print("  kernels: " + ", ".join(f"{c.name} {c.kernels()}" for c in contenders))


def _keep_freed_memory() -> None:
    """Have glibc reuse large blocks: a page fault for every 4 KiB would hide the difference."""
    m_trim_threshold, m_mmap_max = -1, -4
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lpln_autopatch.bench.call",
        description="Compare the cost of one LayerNorm call, as ratios.",
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=60, help="rounds of timing (default 60)")
    args = parser.parse_args()
    refuse_to_run(args.device)
    torch.set_num_threads(1)
    _keep_freed_memory()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {args.device}", end=", ")
    print(f"{os.cpu_count()} CPUs, autocast to {args.dtype}, {args.rounds} rounds")
    with low_precision_layernorm():
        pass  # the wrapper stays, inert
    inputs = [torch.float32]
    if args.device != "cpu" or CPU_TAKES_MIXED_DTYPES:
        inputs.append(getattr(torch, args.dtype))
    for input_dtype, shape in itertools.product(inputs, (SMALL, LARGE)):
        compare(shape, args, input_dtype, backward=False)
        compare(shape, args, input_dtype, backward=True)
    disable()


if __name__ == "__main__":
    main()
