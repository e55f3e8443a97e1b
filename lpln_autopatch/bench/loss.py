"""Trainings of small models, stock and lowered: does lowering cost quality, do losses spike?

The model of docs/examples learns the sources of Python's standard library. `--policy cuda` adds a
ViT on scikit-learn's digits, and Llama and OLMo 2 of transformers. From a seed all contenders get
the same weights and batches.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lpln_autopatch import exempt
from lpln_autopatch._hand_written import kinds
from lpln_autopatch.bench import recipe
from lpln_autopatch.bench.contenders import (
    Contender,
    StockLayerNorm,
    relative_error,
    require,
    sift,
)
from lpln_autopatch.bench.policy import policy
from lpln_autopatch.bench.results import Figure, Row, short
from lpln_autopatch.bench.timing import Progress
from lpln_autopatch.bench.trainings import causal_lm, digits, example

LEGEND = """\
gives                the dtype of what the LayerNorms return
gradient norm        of all parameters, the mean of the last tenth of the steps
skipped steps        by the GradScaler, of all seeds
final loss           the mean of the last tenth of the steps, and of the seeds
spread of seeds      the standard deviation of the final losses
minus stock          the mean of the differences of final losses, paired by seed
95 % +-              the interval of that mean
largest minus stock  of these differences
largest rise         of a loss above the mean of the ten before it: a spike"""
# Of Student's distribution, by degrees of freedom: a 95 % interval of a mean.
T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FLOAT32 = Contender("float32")
STOCK = Contender("stock", StockLayerNorm)
LOWERED = Contender("lowered", backend="auto")
HAND_WRITTEN = {"llama": "LlamaConfig", "olmo2": "Olmo2Config"}
"""Tasks whose models have hand-written norms, before or after a block: their configurations."""


def contenders(options: Namespace, task: str) -> list[Contender]:
    """Return stock and lowered; under CUDA's policy, lowered by the arithmetic of each backend."""
    if options.policy is None:
        return [STOCK, LOWERED]
    if task in HAND_WRITTEN:
        return [FLOAT32, STOCK, Contender("lowered (native)", rms_norm=recipe.AcceleratorRMSNorm)]
    return [
        FLOAT32,
        STOCK,
        Contender("lowered (native)", recipe.AcceleratorRecipe),
        Contender("lowered (fused)", recipe.FusedArithmetic),
        Contender("lowered (lean)", recipe.LeanArithmetic),
    ]


def run(options: Namespace, progress: Progress) -> list[Row]:
    """Train each contender from every seed, on every task, in every autocast dtype."""
    every = tasks(options)
    known = {n for _, task, dtype in every for n, _ in task(dtype, 0).model.named_modules()}
    for name in options.exempt or ():
        if name not in known:
            print(f"--exempt {name}: no model here has a module of that name", file=sys.stderr)
            raise SystemExit(2)
    cost = sum(
        len(contenders(options, case["task"])) * case["seeds"] * case["steps"]
        for case, _, _ in every
    )
    progress.expect(len(every), cost)
    rows: list[Row] = []
    for case, task, dtype in every:
        progress.case(case["task"], case["autocast"], f"{case['seeds']} seeds")
        rows += measure(case, task, dtype, options, progress)
    return rows


def tasks(options: Namespace) -> list[tuple[dict[str, Any], Callable[..., Any], torch.dtype]]:
    """Return the cases, each with a function that makes its training, and its dtype."""
    under_policy, on_cpu = options.policy is not None, options.device.type == "cpu"
    few = 3 if on_cpu and not under_policy else 5
    both = [torch.bfloat16, torch.float16]

    def task(
        name: str, make: Callable[..., Any], dtype: torch.dtype, usual: int, seeds: int = few
    ) -> Any:
        steps = options.steps or (20 if options.quick else usual)
        seeds = options.seeds or (2 if options.quick else seeds)
        case = {"task": name, "autocast": short(dtype), "steps": steps, "seeds": seeds}
        return case, partial(make, steps), dtype

    # The CPU has few kernels for float16: a step takes many times one in bfloat16.
    dtypes = options.dtypes or (both[:1] if on_cpu else both)
    steps = 1000 if under_policy else 200 if on_cpu else 400
    found = [task("text", partial(_text, options), dtype, steps) for dtype in dtypes]
    if under_policy:
        make = partial(digits, options.lr or 2e-3)
        found += [task("digits", make, dtype, 500) for dtype in options.dtypes or both]
        for name, config in HAND_WRITTEN.items():
            make = partial(causal_lm, config, options.lr or 2e-3)
            found += [task(name, make, dtype, 400, 8) for dtype in dtypes]
    wanted = options.tasks or [case["task"] for case, _, _ in found]
    return [each for each in found if each[0]["task"] in wanted]


def measure(
    case: dict[str, Any],
    task: Callable[..., Any],
    dtype: torch.dtype,
    options: Namespace,
    progress: Progress,
) -> list[Row]:
    """Train each contender from every seed of `case`."""

    def learn(contender: Contender) -> tuple[list[list[float]], dict[str, Figure]]:
        autocast = torch.float32 if contender is FLOAT32 else dtype
        runs, marked = [], False
        for seed in range(case["seeds"]):
            training = task(autocast, seed)
            for name, module in training.model.named_modules():
                if name in (options.exempt or ()):
                    marked = bool(exempt(module))
            runs.append(_train(training, contender, progress))
        given = set().union(*(run[1] for run in runs))
        about: dict[str, Figure] = {"gives": contender.gives(given, dtype, marked)}
        about["gradient norm"] = statistics.fmean(run[2] for run in runs)
        about["skipped steps"] = sum(run[3] for run in runs)
        return [run[0] for run in runs], about

    threads = torch.get_num_threads()
    with contextlib.ExitStack() as under:
        if options.policy is not None:
            under.enter_context(policy("cpu"))
            torch.set_num_threads(1)  # its models are small
            under.callback(torch.set_num_threads, threads)
        passed, reasons = sift(contenders(options, case["task"]), learn)
    rows = [Row(case, contender.name, reason=reason) for contender, reason in reasons.items()]
    for contender, (curves, about) in passed.items():
        figures = {**about, **_figures(curves, passed.get(STOCK, (curves,))[0])}
        rows.append(Row(case, contender.name, figures, curves=curves))
    return rows


def _text(options: Namespace, steps: int, dtype: torch.dtype, seed: int) -> Any:
    arguments = ["--device", options.device.type, "--steps", str(steps), "--seed", str(seed)]
    if options.policy is not None:
        arguments += ["--width", "64", "--layers", "2", "--context", "64", "--lr", "0.002"]
    if options.quick:
        arguments += ["--width", "32", "--layers", "2", "--heads", "2", "--context", "32"]
    args = example().parse_arguments([*arguments, *(["--lr", str(options.lr)] * bool(options.lr))])
    args.dtype = short(dtype)
    return example().Training(args, example().standard_library_text())


def _train(
    training: Any, contender: Contender, progress: Progress
) -> tuple[list[float], set[torch.dtype], float, int]:
    """Return losses, output dtypes of norms, the last tenth's gradient norm, skipped steps.

    The first loss, of the untrained model, must be the loss in float64.
    """
    exact = _loss_in_float64(training)
    dtypes = _recorded_dtypes(training.model)
    losses: list[torch.Tensor] = []
    norms: list[float] = []
    skipped, scale = 0, training.scaler.get_scale()
    steps = training.args.steps
    # The rate falls to 0, so that the loss flattens and shows the difference of contenders.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, steps)
    with contender.applied(training.model), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*autocast.*"
        )  # the contender float32 autocasts to it
        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")  # the first step was skipped
        for step in range(steps):
            losses.append(training.step())
            schedule.step()
            skipped += training.scaler.get_scale() < scale
            scale = training.scaler.get_scale()
            if step >= steps - steps // 10:
                gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
                norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
            progress.update()
    error = relative_error(losses[0], exact)
    limit = 4 * torch.finfo(getattr(torch, training.args.dtype)).eps
    require({"the first loss": error}, {"the first loss": max(limit, 1e-5)})
    # More digits would be noise.
    return [round(loss.item(), 5) for loss in losses], dtypes, statistics.fmean(norms), skipped


def _recorded_dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    """Return a set that collects the output dtypes of the norms of `model`."""
    dtypes: set[torch.dtype] = example().record_layernorm_dtypes(model)
    for module in model.modules():
        if kinds.candidate(type(module)) is not None:
            module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    return dtypes


def _loss_in_float64(training: Any) -> torch.Tensor:
    """Return the loss of the next batch in float64; the training still gets that batch."""
    state = training.generator.get_state()
    batch = training.batch()
    training.generator.set_state(state)
    batch = [t.double() if t.is_floating_point() else t for t in batch]
    with torch.no_grad():
        loss: torch.Tensor = copy.deepcopy(training.model).double()(*batch)
    return loss


def _figures(
    curves: Sequence[Sequence[float]], stock: Sequence[Sequence[float]]
) -> dict[str, Figure]:
    """Return the figures of the final losses, which are means of the last tenth of the steps."""
    final, stocks = (
        [statistics.fmean(c[-(len(c) // 10) :]) for c in each] for each in (curves, stock)
    )
    differences = [ours - theirs for ours, theirs in zip(final, stocks, strict=True)]
    seeds = len(differences)
    quantile = T_95[min(seeds - 1, len(T_95)) - 1]
    return {
        "final loss": statistics.fmean(final),
        "spread of seeds": statistics.stdev(final),
        "minus stock": statistics.fmean(differences),
        "95 % +-": quantile * statistics.stdev(differences) / seeds**0.5,
        "largest minus stock": max(differences, key=abs),
        "largest rise": max(map(_largest_rise, curves)),
    }


def _largest_rise(curve: Sequence[float], window: int = 10) -> float:
    """Return the largest rise of a loss above the mean of the ten losses before it: a spike."""
    before = (curve[i - window : i] for i in range(window, len(curve)))
    return max(loss - statistics.fmean(b) for loss, b in zip(curve[window:], before, strict=True))
