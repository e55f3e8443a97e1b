"""LayerNorm alone, on the device: forward, and forward and backward, over a grid.

The bytes are those that no LayerNorm can do without: forward reads x and writes y in the autocast
dtype; backward reads x and the gradient of y, and writes that of x. Their rate is compared with
that of a copy on the same device, timed in the same turns.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator

import torch

from lpln_autopatch.bench import timing
from lpln_autopatch.bench.layer import PASSES, Case, Layer, rows_of
from lpln_autopatch.bench.options import Options
from lpln_autopatch.bench.results import Figure, Row
from lpln_autopatch.bench.rivals import COMPILED, LOWERED, OTHERS, STOCK, composer, sift
from lpln_autopatch.bench.timing import Entry, Progress, Quartiles
from lpln_autopatch.torch_compat import CPU_TAKES_MIXED_DTYPES, forget_compiled_code

FEATURES = (768, 1024, 1600, 2048, 4096, 5120, 8192, 16384)


def grid(options: Options) -> Iterator[Case]:
    """The cases: at least 128 MiB of output on an accelerator, 8 MiB on CPU."""
    on_cpu = options.device.type == "cpu"
    elements = 1 << 16 if options.quick else 4 << 20 if on_cpu else 64 << 20
    features = options.features or ((256,) if options.quick else (1024,) if on_cpu else FEATURES)
    dtypes = options.dtypes or (
        [torch.bfloat16] if options.quick or on_cpu else [torch.bfloat16, torch.float16]
    )
    biases = (True,) if options.quick or on_cpu else (True, False)
    for n, dtype, bias in itertools.product(features, dtypes, biases):
        yield Case(-(-elements // n), n, torch.float32, dtype, bias)
        if not options.quick and (not on_cpu or CPU_TAKES_MIXED_DTYPES):
            yield Case(-(-elements // n), n, dtype, dtype, bias)


def run(options: Options, progress: Progress) -> list[Row]:
    """Measure every contender at every point of the grid."""
    cases = list(grid(options))
    progress.reset(len(cases) * len(PASSES) * options.rounds_or(20))
    timing.keep_freed_memory()
    rows: list[Row] = []
    for case in cases:
        progress.set_description_str(f"kernel, {case.rows}x{case.features}")
        # After a few cases torch.compile would take it that no shape is worth compiling for.
        forget_compiled_code()
        rows += _measure(Layer(case, options.device, _cache(options.device)), options, progress)
    return rows


def _measure(layer: Layer, options: Options, progress: Progress) -> list[Row]:
    contenders = (STOCK, *LOWERED, composer(options.device), *COMPILED, *OTHERS)
    passed, reasons = layer.check(contenders)
    copy_each = copying(layer)
    rows: list[Row] = []
    for backward in PASSES:
        make = functools.partial(layer.entry, backward=backward, graph=options.graph)
        # Not every kernel can be captured in a graph.
        made, failed = sift(passed, options.device, make)
        entries = list(made.values())
        call = timing.graphed(copy_each) if options.graph else copy_each
        copy = Entry("copy", contextlib.nullcontext, call)
        rounds, clock = options.rounds_or(20), timing.device_seconds
        timing.interleave([*entries, copy], clock, options.device, rounds, progress)
        checked = {c: passed[c] for c in made}, {**reasons, **failed}
        size = _bytes(layer.case, backward)

        def speed(entry: Entry, size: int = size, copy: Entry = copy) -> dict[str, Figure]:
            share = (size / _copied(layer) * ratio for ratio in copy.over(entry))
            return {**_absolute(layer, entry, size), "share of copy": Quartiles(*share)}

        rows += rows_of(layer, backward, checked, entries, speed)
        figures = _absolute(layer, copy, _copied(layer))
        rows.append(Row(layer.case.aspects(backward), copy.name, figures))
    return rows


def copying(layer: Layer) -> Callable[[], None]:
    """Copies each of the inputs, to a place of its own: a single one would stay in the cache."""
    targets = [torch.empty_like(x, requires_grad=False) for x in layer.xs]

    def copy_each() -> None:
        for target, x in zip(targets, layer.xs, strict=True):
            target.copy_(x.detach())

    return copy_each


def _absolute(layer: Layer, entry: Entry, size: int) -> dict[str, Figure]:
    """Time for one of the inputs, and the rate at which `size` bytes went by; not of a CPU."""
    if layer.device.type == "cpu":
        return {}
    seconds = [each / len(layer.xs) for each in entry.seconds]
    rate = size / 1e9 / statistics.median(seconds)
    return {"us": Quartiles.of([1e6 * each for each in seconds]), "GB/s": rate}


def _bytes(case: Case, backward: bool) -> int:
    x, y = (torch.finfo(dtype).bits // 8 for dtype in (case.input, case.autocast))
    return case.rows * case.features * (x + y + (x + y + x if backward else 0))


def _copied(layer: Layer) -> int:
    return 2 * layer.bytes_of_x


def _cache(device: torch.device) -> int:
    """Bytes of the last cache before the memory; a guess where torch does not know it."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return int(getattr(properties, "L2_cache_size", 64 << 20))
