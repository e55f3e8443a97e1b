"""The contenders: the ways of running the norms of a module."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lpln_autopatch import backends, low_precision_layernorm
from lpln_autopatch._exemption import is_exempt
from lpln_autopatch._hand_written import kinds
from lpln_autopatch._request import parse_norms
from lpln_autopatch.backends import fused
from lpln_autopatch.bench.recipe import ComposerGroupNorm, ComposerRecipe
from lpln_autopatch.bench.results import short

_Passed = TypeVar("_Passed")


class StockLayerNorm(torch.nn.LayerNorm):
    """torch's own LayerNorm, in a class of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class WrongResult(Exception):
    """A contender runs stock where it should not, or is less precise than allowed."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of running the norms of a module."""

    name: str
    layer_norm: type[torch.nn.LayerNorm] | None = None  # that the LayerNorms take; or their own
    backend: str | None = None  # of the block around it, if there is one
    norms: str = "layer_norm"  # those that are lowered
    rms_norm: type[torch.nn.Module] | None = None  # that hand-written norms take

    def gives(
        self, dtypes: Iterable[torch.dtype], autocast: torch.dtype, exempt: bool = False
    ) -> str:
        """Return the dtypes of its norms' outputs, in words. If ours has run stock, raise."""
        words = ", ".join(sorted(set(map(short, dtypes)))) or "nothing"
        if self.backend is not None and words != short(autocast) and not exempt:
            raise WrongResult(f"it should give {short(autocast)} and gives {words}")
        return words

    @contextlib.contextmanager
    def applied(self, module: torch.nn.Module) -> Iterator[None]:
        """Let this contender run the norms of `module`.

        The norms keep their parameters and change their class, as in
        `apply_low_precision_layernorm`, so that all contenders run the same module.
        """
        classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}
        if self.layer_norm is not None:
            named = parse_norms(self.norms)
            if "layer_norm" in named:
                classes[torch.nn.LayerNorm] = self.layer_norm
            if "group_norm" in named:
                classes[torch.nn.GroupNorm] = ComposerGroupNorm
        if self.rms_norm is not None:
            by_hand = {type(m) for m in module.modules() if kinds.candidate(type(m)) is not None}
            classes.update(dict.fromkeys(by_hand, self.rms_norm))
        # Subclasses too, as Composer's surgery does.
        norms = (m for m in module.modules() if isinstance(m, tuple(classes)))
        own = {m: type(m) for m in norms if not is_exempt(m)}
        block: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.backend in ("fused", "lean") and fused.why_native():
            raise ImportError(fused.why_native())
        if self.backend is not None:
            block = low_precision_layernorm(backend=self.backend, norms=self.norms)
        for norm in own:
            norm.__class__ = next(new for old, new in classes.items() if isinstance(norm, old))
        try:
            with block:
                yield
        finally:
            for norm, cls in own.items():
                norm.__class__ = cls


STOCK = Contender("stock")


def of_models(mode: str, norms: str) -> list[Contender]:
    """Return the contenders of models: stock, ours by each backend, and Composer's recipe."""
    # Compiled code is PyTorch's own, whatever the backend.
    ours = ("native", "fused", "lean") if mode == "eager" else ("native",)
    return [
        STOCK,
        *(Contender(b, backend=b, norms=norms) for b in ours if b in backends.names()),
        Contender("recipe", ComposerRecipe, norms=norms),
    ]


def sift(
    contenders: Iterable[Contender], check: Callable[[Contender], _Passed]
) -> tuple[dict[Contender, _Passed], dict[Contender, str]]:
    """Return the result of `check` for each contender that passes, and the others' reasons."""
    passed: dict[Contender, _Passed] = {}
    reasons: dict[Contender, str] = {}
    for contender in contenders:
        try:
            passed[contender] = check(contender)
        except ImportError as error:
            reasons[contender] = str(error)
        # A contender may raise anything. The others are measured all the same.
        except Exception as error:
            message = str(error) or "no message"
            reasons[contender] = f"{type(error).__name__}: {message.splitlines()[0]}"
    return passed, reasons


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of `exact`."""
    return float((value.detach().double() - exact).norm() / exact.norm())


def require(errors: dict[str, float], limits: dict[str, float]) -> None:
    """Refuse a contender one of whose relative errors is at its limit or above, or NaN."""
    for name, error in errors.items():
        if not error < limits[name]:
            raise WrongResult(f"error of {name} {error:.2g}, allowed {limits[name]:.2g}")
