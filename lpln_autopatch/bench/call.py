"""One LayerNorm call on the host: what dispatch costs, whatever the device does meanwhile.

On CPU that is the whole call. The module is called, and `F.layer_norm` by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from lpln_autopatch import low_precision_layernorm
from lpln_autopatch.bench import timing
from lpln_autopatch.bench.layer import PASSES, Case, Layer, rows_of
from lpln_autopatch.bench.options import Options
from lpln_autopatch.bench.results import Figure, Row
from lpln_autopatch.bench.rivals import (
    INERT,
    INERT_FUNCTION,
    LOWERED,
    STOCK,
    STOCK_FUNCTION,
    composer,
)
from lpln_autopatch.bench.timing import Entry, Progress
from lpln_autopatch.torch_compat import CPU_TAKES_MIXED_DTYPES

SHAPES = ((8, 64), (4096, 1024))


def cases(options: Options) -> Iterator[Case]:
    """Two shapes, each with float32 input and with input in the autocast dtype."""
    for dtype in options.dtypes or [torch.bfloat16]:
        inputs = [torch.float32]
        if options.device.type != "cpu" or CPU_TAKES_MIXED_DTYPES:
            inputs.append(dtype)
        for x, shape in itertools.product(inputs, SHAPES):
            yield Case(*shape, x, dtype)


def run(options: Options, progress: Progress) -> list[Row]:
    """Time every contender, on one thread."""
    every = list(cases(options))
    progress.reset(2 * len(every) * len(PASSES) * options.rounds_or(60))
    timing.keep_freed_memory()
    with low_precision_layernorm():
        pass  # the wrappers stay, inert
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in every:
        progress.set_description_str(f"call, {case.rows}x{case.features}")
        rows += _measure(Layer(case, options.device), options, progress)
    torch.set_num_threads(threads)
    return rows


def _measure(layer: Layer, options: Options, progress: Progress) -> list[Row]:
    device = options.device

    def kernels(entry: Entry) -> dict[str, Figure]:
        if device.type == "cpu":
            return {}
        with entry.context():
            return {"kernels": timing.kernels(entry.call, device)}

    modules = layer.check((STOCK, INERT, *LOWERED, composer(device)))
    functions = layer.check((STOCK_FUNCTION, INERT_FUNCTION))
    rows: list[Row] = []
    for backward in PASSES:
        for checked in (modules, functions):
            entries = [layer.entry(contender, backward) for contender in checked[0]]
            timing.interleave(entries, timing.host_seconds, device, options.rounds_or(60), progress)
            rows += rows_of(layer, backward, checked, entries, kernels)
    return rows
