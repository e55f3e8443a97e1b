"""One LayerNorm and its inputs, which the contenders of the kernel and call suites run in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lpln_autopatch.bench import timing
from lpln_autopatch.bench.recipe import ComposerRecipe
from lpln_autopatch.bench.results import Figure, Row, ratios, short
from lpln_autopatch.bench.rivals import (
    STOCK,
    STOCK_FUNCTION,
    Contender,
    composer,
    sift,
)
from lpln_autopatch.bench.timing import Entry

PASSES = {False: "forward", True: "forward and backward"}
OF_FORWARD = ("gives", "error y")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a LayerNorm gets: `rows` of `features`, in the dtype `input`."""

    rows: int
    features: int
    input: torch.dtype
    autocast: torch.dtype
    bias: bool = True

    def aspects(self, backward: bool) -> dict[str, object]:
        """What identifies a measurement in the results."""
        return {
            "pass": PASSES[backward],
            "M": self.rows,
            "N": self.features,
            "input": short(self.input),
            "autocast": short(self.autocast),
            "bias": "yes" if self.bias else "no",
        }


class Layer:
    """The LayerNorm of a case, what it gets, and what it should give.

    Args:
        case: Shape and dtypes.
        device: Where it lies.
        cache: Bytes of the device's cache: the inputs together are twice as large, up to 64 of
            them, so that none is found there. 0 for a single input.
    """

    def __init__(self, case: Case, device: torch.device, cache: int = 0) -> None:
        torch.manual_seed(0)
        shape = (case.rows, case.features)
        self.case, self.device = case, device
        self.module = _layer_norm(case, device, torch.float32)
        torch.nn.init.normal_(self.module.weight, 1.0, 0.2)
        if case.bias:
            torch.nn.init.normal_(self.module.bias, 0.0, 0.2)
        self.bytes_of_x = case.rows * case.features * torch.finfo(case.input).bits // 8
        count = min(64, 1 + 2 * cache // self.bytes_of_x)
        self.xs, self.upstreams = (
            [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
            for dtype in (case.input, case.autocast)
        )
        for x in self.xs:
            x.requires_grad_()
        self._runs: dict[Contender, Callable[[Tensor], Tensor]] = {}

    def check(self, contenders: Iterable[Contender]) -> Checked:
        """Compare each contender with float64."""
        exact_module = _layer_norm(self.case, self.device, torch.float64)
        exact_module.load_state_dict(self.module.state_dict())
        x = self.xs[0].detach().double().requires_grad_()
        exact = _results(exact_module, exact_module, x, self.upstreams[0].double())
        errors = functools.partial(self._errors, exact, self._limits(exact))
        return sift(contenders, self.device, errors)

    def _limits(self, exact: dict[str, Tensor]) -> dict[str, float]:
        """Errors that the autocast dtype explains: four roundings, and of the parameters' gradients
        twice the error of PyTorch's own kernel in that dtype, if that is more.

        On CPU it sums them in that dtype, and is off by 0.05 at 4096 rows.
        """
        run = functools.partial(ComposerRecipe.forward, self.module)  # type: ignore[arg-type]
        with torch.autocast(self.device.type, dtype=self.case.autocast):
            got = _results(run, self.module, self.xs[0], self.upstreams[0])
        limits = dict.fromkeys(exact, 4 * torch.finfo(self.case.autocast).eps)
        for name in limits.keys() - {"y", "dx"}:
            limits[name] = max(limits[name], 2 * timing.relative_error(got[name], exact[name]))
        return limits

    def _errors(
        self, exact: dict[str, Tensor], limits: dict[str, float], contender: Contender
    ) -> dict[str, Figure]:
        """Its output dtype, and its errors, of the output rounded to the autocast dtype.

        Raises:
            WrongResult: it ran stock and should not, or an error is larger than its precision
                explains.
        """
        run: Callable[[Tensor], Tensor] = self.module
        if contender.function is not None:
            run = self._calling(contender.function())
        if contender.compiled:
            run = torch.compile(self.module, fullgraph=True, dynamic=False)
        self._runs[contender] = run
        with self._context(contender):
            got = _results(run, self.module, self.xs[0], self.upstreams[0])
        gives = contender.gives([got["y"].dtype], self.case.autocast)
        got["y"] = got["y"].to(self.case.autocast)
        errors = {name: timing.relative_error(got[name], exact[name]) for name in exact}
        timing.require(errors, limits)
        return {"gives": gives, **{f"error {n}": error for n, error in errors.items()}}

    def _calling(self, function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        m = self.module
        shape, weight, bias, eps = m.normalized_shape, m.weight, m.bias, m.eps
        return lambda x: function(x, shape, weight, bias, eps)

    @contextlib.contextmanager
    def _context(self, contender: Contender) -> Iterator[None]:
        autocast = torch.autocast(self.device.type, dtype=self.case.autocast)
        with autocast, contender.applied(self.module):
            yield

    def entry(self, contender: Contender, backward: bool, graph: bool = False) -> Entry:
        """A contender that has passed `check`, whose call is a pass over each of the inputs."""
        context = functools.partial(self._context, contender)
        run, parameters = self._runs[contender], list(self.module.parameters())
        with context():
            dtype = run(self.xs[0]).dtype
            upstreams = [upstream.to(dtype) for upstream in self.upstreams]

            def forward() -> None:
                for x in self.xs:
                    run(x)

            def forward_and_backward() -> None:
                for x, upstream in zip(self.xs, upstreams, strict=True):
                    torch.autograd.grad(run(x), [x, *parameters], upstream)

            call = forward_and_backward if backward else forward
            return Entry(contender.name, context, timing.graphed(call) if graph else call)


Checked = tuple[dict[Contender, dict[str, Figure]], dict[Contender, str]]


def rows_of(
    layer: Layer,
    backward: bool,
    checked: Checked,
    entries: Sequence[Entry],
    figures: Callable[[Entry], dict[str, Figure]],
) -> list[Row]:
    """A row for each contender: `figures` and ratios of the entries, reasons of the others."""
    passed, reasons = checked
    aspects = layer.case.aspects(backward)
    rows = [Row(aspects, contender.name, reason=reason) for contender, reason in reasons.items()]
    baselines = (STOCK.name, STOCK_FUNCTION.name, composer(layer.device).name)
    for contender, entry in zip(passed, entries, strict=True):
        checks = {n: f for n, f in passed[contender].items() if backward or n in OF_FORWARD}
        ratio = ratios(entry, entries, baselines)
        rows.append(Row(aspects, contender.name, {**figures(entry), **ratio, **checks}))
    return rows


def _layer_norm(case: Case, device: torch.device, dtype: torch.dtype) -> torch.nn.LayerNorm:
    module = torch.nn.LayerNorm(case.features, device=device, dtype=dtype)
    if not case.bias:  # an argument of LayerNorm since torch 2.1
        module.register_parameter("bias", None)
    return module


def _results(
    run: Callable[[Tensor], Tensor], module: torch.nn.Module, x: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    y = run(x)
    inputs = {"x": x, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(y, list(inputs.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(inputs, gradients, strict=True)}}
