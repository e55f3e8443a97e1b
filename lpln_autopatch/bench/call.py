"""One call of LayerNorm: its time and its error; and the time of a block around it.

It runs on one thread, from the start of a turn to the end of all that the turn launched: on a CPU
in the thread's own time, on a GPU in wall time.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import CPU_TAKES_MIXED_DTYPES
from lpln_autopatch.bench import contenders, timing
from lpln_autopatch.bench.contenders import Contender, relative_error
from lpln_autopatch.bench.recipe import ComposerRecipe
from lpln_autopatch.bench.results import Figure, Quartiles, Row, short
from lpln_autopatch.bench.timing import Entry, Progress

LEGEND = """\
M, N     rows, and features of a row; input: the dtype of x
/ NAME   time over that of NAME: median (quartiles) of the rounds; below 1 is faster
stubbed  the host's time alone: Triton has compiled the kernels of fused and lean, for a GPU that
         need not be here, and nothing launches them; "native on a GPU" runs the operators that
         native runs there, on CPU tensors
gives    the dtype of what LayerNorm returns
error    relative, against float64: of y once rounded to the autocast dtype, of each gradient"""
SMALL, LARGE, LARGE_ON_A_GPU = (8, 64), (4096, 1024), (65536, 1024)
PASSES = {False: "forward", True: "forward and backward"}
STOCK = Contender("stock", contenders.StockLayerNorm)
RECIPE = Contender("Composer's recipe", ComposerRecipe)
BACKENDS = ("native", "fused", "lean")


def contenders_on(device: torch.device) -> list[Contender]:
    """Return the contenders; stock is the first."""
    # On CPU fused and lean are native.
    ours = ("native",) if device.type == "cpu" else BACKENDS
    lowered = [Contender(f"lowered ({name})", backend=name) for name in ours]
    return [STOCK, Contender("inert"), *lowered, RECIPE]


def run(options: Namespace, progress: Progress) -> list[Row]:
    """Time every contender: two shapes, each with float32 x and with x in the autocast dtype."""
    with timing.warns_where_it_is_busy("call", options.device):
        rows = _rows(options, progress)
    return rows + _host_rows(_rounds(options), progress)


def _rounds(options: Namespace) -> int:
    return options.rounds or (2 if options.quick else 60)


def _rows(options: Namespace, progress: Progress) -> list[Row]:
    shapes = SMALL, LARGE if options.device.type == "cpu" else LARGE_ON_A_GPU
    mixed = options.device.type != "cpu" or CPU_TAKES_MIXED_DTYPES
    cases = [
        (shape, x, dtype)
        for dtype in options.dtypes or [torch.bfloat16]
        for x in [torch.float32, *[dtype] * mixed]
        for shape in shapes
    ]
    rounds = _rounds(options)
    progress.expect(len(cases) + 2, (len(PASSES) * len(cases) + 1) * rounds + 1)
    timing.keep_freed_memory()
    with low_precision_layernorm():
        pass  # "inert" comes after a block
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    for shape, x, dtype in cases:
        progress.case("x".join(map(str, shape)), short(x), short(dtype))
        layer = Layer(shape, x, dtype, options.device)
        passed, reasons = layer.check(contenders_on(options.device))
        for backward in PASSES:
            case = {"pass": PASSES[backward], **layer.case}
            rows += [Row(case, c.name, reason=reason) for c, reason in reasons.items()]
            entries = {c: layer.entry(c, backward) for c in passed}
            timing.interleave(list(entries.values()), options.device, rounds, progress)
            others = [other for other in (STOCK, RECIPE) if other in entries]
            for contender, entry in entries.items():
                ratios = {f"/ {o.name}": entry.over(entries[o]) for o in others if o != contender}
                checks = {n: f for n, f in passed[contender].items() if backward or " d" not in n}
                rows.append(Row(case, contender.name, {**ratios, **checks}))
    rows.append(_block_row(options.device, rounds, progress))
    torch.set_num_threads(threads)
    return rows


def _block_row(device: torch.device, rounds: int, progress: Progress) -> Row:
    """Time entering and leaving a block, with nothing else open, against `torch.autocast`."""
    progress.case("block")

    def enter_and_leave(block: AbstractContextManager[object]) -> None:
        with block:
            pass

    blocks: dict[str, AbstractContextManager[object]] = {
        "torch.autocast": torch.autocast(device.type, dtype=torch.bfloat16),
        "a block": low_precision_layernorm(),
    }
    autocast, ours = (
        Entry(name, contextlib.nullcontext, functools.partial(enter_and_leave, block))
        for name, block in blocks.items()
    )
    timing.interleave([autocast, ours], device, rounds, progress)
    case = {"pass": "enter and leave"}
    return Row(case, ours.name, {f"/ {autocast.name}": ours.over(autocast)})


def _host_rows(rounds: int, progress: Progress) -> list[Row]:
    """Time the host's part of a small call, by each backend, in a process of its own."""
    progress.case("host")
    command = [sys.executable, "-m", "lpln_autopatch.bench.host", str(rounds)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    progress.update()
    if done.returncode != 0:
        why = (done.stderr.splitlines() or ["no message"])[-1]
        case = {"pass": "kernels stubbed out"}
        return [Row(case, f"lowered ({name})", reason=why) for name in BACKENDS]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    for row in rows:
        row["figures"] = {name: Quartiles(**ratio) for name, ratio in row["figures"].items()}
    return [Row(**row) for row in rows]


class Layer:
    """A LayerNorm, its input, and the exact output and gradients."""

    def __init__(
        self,
        shape: tuple[int, int],  # rows, and features of a row
        x: torch.dtype,
        autocast: torch.dtype,
        device: torch.device,
        mean: float = 0.0,  # of x
    ) -> None:
        self.case = {"M": shape[0], "N": shape[1], "input": short(x), "autocast": short(autocast)}
        self.device, self.autocast = device, autocast
        self.x = (torch.randn(shape, device=device) + mean).to(x).requires_grad_()
        self.upstream = torch.randn_like(self.x, dtype=autocast)
        self.module = torch.nn.LayerNorm(shape[1], device=device)
        torch.nn.init.normal_(self.module.weight, 1.0, 0.2)
        torch.nn.init.normal_(self.module.bias, 0.0, 0.2)
        exact = copy.deepcopy(self.module).double()
        self._exact = _results(exact, exact, self.x.double(), self.upstream)

    def errors(
        self, contender: Contender, run: Callable[[Tensor], Tensor]
    ) -> tuple[torch.dtype, dict[str, float]]:
        """Return the dtype of the contender's output, and the errors of output and gradients.

        They are relative, against float64. The output is rounded to the autocast dtype first.
        """
        with self._context(contender):
            got = _results(run, self.module, self.x, self.upstream)
        dtype = got["y"].dtype
        got["y"] = got["y"].to(self.autocast)
        return dtype, {name: relative_error(got[name], e) for name, e in self._exact.items()}

    def check(
        self, group: Sequence[Contender]
    ) -> tuple[dict[Contender, dict[str, Figure]], dict[Contender, str]]:
        """Return the output dtype and errors of the right contenders, and why the others are wrong.

        The limit is four roundings to the autocast dtype. For the gradients of the parameters it is
        half more than the error of PyTorch's own kernel in that dtype, if that is more: on CPU the
        kernel sums them in that dtype, and is off by 0.05 to 0.08 at 4096 rows.
        """
        limits = {n: 1.5 * error for n, error in self.errors(RECIPE, self.module)[1].items()}
        four = 4 * torch.finfo(self.autocast).eps
        limits = {n: four if n in ("y", "dx") else max(four, e) for n, e in limits.items()}

        def figures(contender: Contender) -> dict[str, Figure]:
            dtype, errors = self.errors(contender, self.module)
            gives = contender.gives([dtype], self.autocast)
            contenders.require(errors, limits)
            return {"gives": gives, **{f"error {n}": error for n, error in errors.items()}}

        return contenders.sift(group, figures)

    def entry(self, contender: Contender, backward: bool) -> Entry:
        """Return the entry of a contender that has passed `check`, with the call that is timed."""
        context = functools.partial(self._context, contender)
        run, x, parameters = self.module, self.x, list(self.module.parameters())
        with context():
            upstream = self.upstream.to(run(x).dtype)

        def forward_and_backward() -> None:
            torch.autograd.grad(run(x), [x, *parameters], upstream)

        call = forward_and_backward if backward else functools.partial(run, x)
        return Entry(contender.name, context, call)

    @contextlib.contextmanager
    def _context(self, contender: Contender) -> Iterator[None]:
        autocast = torch.autocast(self.device.type, dtype=self.autocast)
        with autocast, contender.applied(self.module):
            yield


def _results(
    run: Callable[[Tensor], Tensor], module: torch.nn.Module, x: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    """Return the output, and the gradients of x and of the parameters of `module`, by name."""
    x = x.detach().requires_grad_()
    y = run(x)
    inputs = {"x": x, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(y, list(inputs.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(inputs, gradients, strict=True)}}
