"""What a language model learns, stock and lowered: does it cost quality, does it spike?

The model of docs/examples, trained on the sources of Python's standard library from several seeds.
Stock and lowered get the same initial weights and the same batches.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from lpln_autopatch.bench import timing
from lpln_autopatch.bench.options import Options
from lpln_autopatch.bench.results import Figure, Row, short
from lpln_autopatch.bench.rivals import STOCK, Contender, sift
from lpln_autopatch.bench.timing import Progress

LOWERED = Contender("lowered", backend="auto")


def run(options: Options, progress: Progress) -> list[Row]:
    """Train both from every seed, in every autocast dtype."""
    # On CPU float16 has few kernels, and a step of it takes many times one of bfloat16.
    on_cpu = options.device.type == "cpu"
    dtypes = options.dtypes or ([torch.bfloat16] if on_cpu else [torch.bfloat16, torch.float16])
    seeds = options.seeds or (2 if options.quick else 3 if on_cpu else 5)
    steps = options.steps or (20 if options.quick else 200 if on_cpu else 400)
    progress.reset(2 * len(dtypes) * seeds * steps)
    rows: list[Row] = []
    for dtype in dtypes:
        progress.set_description_str(f"loss, {short(dtype)}")
        rows += _measure(dtype, seeds, steps, options, progress)
    return rows


def _measure(
    dtype: torch.dtype, seeds: int, steps: int, options: Options, progress: Progress
) -> list[Row]:
    arguments = ["--device", options.device.type, "--dtype", short(dtype), "--steps", str(steps)]
    if options.quick:
        arguments += ["--width", "32", "--layers", "2", "--heads", "2", "--context", "32"]
    text = example().standard_library_text()

    def learn(contender: Contender) -> tuple[list[list[float]], str]:
        curves, given = [], set()
        for seed in range(seeds):
            args = example().parse_arguments([*arguments, "--seed", str(seed)])
            curve, dtypes = _train(example().Training(args, text), contender, progress)
            curves.append(curve)
            given |= dtypes
        return curves, contender.gives(given, dtype)

    passed, reasons = sift((STOCK, LOWERED), options.device, learn)
    case = {"autocast": short(dtype), "steps": steps, "seeds": seeds}
    rows = [Row(case, contender.name, reason=reason) for contender, reason in reasons.items()]
    for contender, (curves, gives) in passed.items():
        figures = {"gives": gives, **_figures(curves, passed.get(STOCK, (curves,))[0])}
        rows.append(Row(case, contender.name, figures, curves=curves))
    return rows


def example() -> Any:
    """The script of docs/examples, which is in the wheel under this name."""
    return import_module("lpln_autopatch.bench.example")


def _train(
    training: Any, contender: Contender, progress: Progress
) -> tuple[list[float], set[torch.dtype]]:
    """The loss of each step, and the dtypes that the LayerNorms gave.

    Raises:
        WrongResult: that of the first, of the untrained model, is not what float64 gives.
    """
    exact = _loss_in_float64(training)
    dtypes = example().record_layernorm_dtypes(training.model)
    losses: list[torch.Tensor] = []
    with contender.applied(training.model):
        for _ in range(training.args.steps):
            losses.append(training.step())
            progress.update()
    error = timing.relative_error(losses[0], exact)
    limit = 4 * torch.finfo(getattr(torch, training.args.dtype)).eps
    timing.require({"the first loss": error}, {"the first loss": limit})
    return [loss.item() for loss in losses], dtypes


def _loss_in_float64(training: Any) -> torch.Tensor:
    """The loss of the next batch, which the training still gets."""
    state = training.generator.get_state()
    batch = example().sample_batch(training.text, training.args, training.generator)
    training.generator.set_state(state)
    with torch.no_grad():
        loss: torch.Tensor = copy.deepcopy(training.model).double()(*batch)
    return loss


def _figures(
    curves: Sequence[Sequence[float]], stock: Sequence[Sequence[float]]
) -> dict[str, Figure]:
    """Final losses (means of the last tenth of the steps) over the seeds, beside those of stock."""
    final, stocks = (
        [statistics.fmean(c[-(len(c) // 10) :]) for c in each] for each in (curves, stock)
    )
    differences = [ours - theirs for ours, theirs in zip(final, stocks, strict=True)]
    return {
        "final loss": statistics.fmean(final),
        "spread of seeds": statistics.stdev(final),
        "minus stock": statistics.fmean(differences),
        "largest minus stock": max(differences, key=abs),
        "largest rise": max(map(_largest_rise, curves)),
    }


def _largest_rise(curve: Sequence[float], window: int = 10) -> float:
    """How far a loss is above the mean of the ten before it, at most: a spike."""
    before = (curve[i - window : i] for i in range(window, len(curve)))
    return max(loss - statistics.fmean(b) for loss, b in zip(curve[window:], before, strict=True))
