"""The contenders: what runs a LayerNorm, ours and others', and why it cannot where it cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lpln_autopatch import low_precision_layernorm
from lpln_autopatch.bench.recipe import ComposerGroupNorm, ComposerRecipe
from lpln_autopatch.bench.results import short
from lpln_autopatch.bench.timing import WrongResult

LayerNormClass = type[torch.nn.LayerNorm]
_Passed = TypeVar("_Passed")


# This module sees torch's own function, before anything wraps it.
_stock = types.SimpleNamespace(layer_norm=F.layer_norm)


class Stock(torch.nn.LayerNorm):
    """torch's own LayerNorm, beside the wrappers."""

    def forward(self, input: Tensor) -> Tensor:
        return _stock.layer_norm(  # type: ignore[no-any-return]
            input, self.normalized_shape, self.weight, self.bias, self.eps
        )


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of running the LayerNorms of a module.

    Attributes:
        name: What the tables call it.
        load: The class that the LayerNorms take, looked for when it is needed; None: their own.
        backend: That of the block around it; None for no block.
        norms: What the block lowers.
        function: Looks for what is called in place of the module: `F.layer_norm` by itself.
        compiled: Whether it runs under torch.compile.
        device_type: The only one that it runs on, or None.
    """

    name: str
    load: Callable[[], LayerNormClass] | None = None
    backend: str | None = None
    norms: str = "layer_norm"
    function: Callable[[], Callable[..., Tensor]] | None = None
    compiled: bool = False
    device_type: str | None = None

    def _block(self) -> contextlib.AbstractContextManager[object]:
        if self.backend is None:
            return contextlib.nullcontext()
        return low_precision_layernorm(backend=self.backend, norms=self.norms)

    def gives(self, dtypes: Iterable[torch.dtype], autocast: torch.dtype) -> str:
        """The dtypes that its LayerNorms gave, in words.

        Raises:
            WrongResult: it is one of ours, and a LayerNorm of it ran stock.
        """
        words = ", ".join(sorted(set(map(short, dtypes)))) or "nothing"
        if self.backend is not None and words != short(autocast):
            raise WrongResult(f"it should give {short(autocast)} and gives {words}")
        return words

    @contextlib.contextmanager
    def applied(self, module: torch.nn.Module) -> Iterator[None]:
        """Have this contender run the LayerNorms of `module`.

        They keep their parameters and change their class, as in `apply_low_precision_layernorm`,
        so that all contenders run the same module.
        """
        layers: dict[torch.nn.Module, type] = {}
        if self.load is not None:
            classes: dict[type[torch.nn.Module], type[torch.nn.Module]]
            classes = {torch.nn.LayerNorm: self.load()}
            if self.norms == "all":
                classes[torch.nn.GroupNorm] = ComposerGroupNorm
            # Subclasses too, as Composer's surgery does.
            layers = {m: type(m) for m in module.modules() if isinstance(m, tuple(classes))}
            for layer in layers:
                layer.__class__ = next(
                    new for old, new in classes.items() if isinstance(layer, old)
                )
        try:
            with self._block():
                yield
        finally:
            for layer, own in layers.items():
                layer.__class__ = own


def sift(
    contenders: Iterable[Contender], device: torch.device, check: Callable[[Contender], _Passed]
) -> tuple[dict[Contender, _Passed], dict[Contender, str]]:
    """What `check` gives for those that pass it, and why the others cannot be measured."""
    passed: dict[Contender, _Passed] = {}
    reasons: dict[Contender, str] = {}
    for contender in contenders:
        if contender.device_type not in (None, device.type):
            reasons[contender] = f"runs on {contender.device_type}, not on {device.type}"
            continue
        try:
            passed[contender] = check(contender)
        except ImportError as error:
            reasons[contender] = " ".join(str(error).split())
        # Others' kernels fail in whatever way on what they do not take.
        except Exception as error:
            message = str(error) or "no message"
            reasons[contender] = f"{type(error).__name__}: {message.splitlines()[0]}"
    return passed, reasons


def _class_that_calls(function: Callable[..., Tensor]) -> LayerNormClass:
    """A LayerNorm that runs `function`, which takes the arguments of `F.layer_norm`."""

    class Rival(torch.nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return function(input, self.normalized_shape, self.weight, self.bias, self.eps)

    return Rival


@functools.cache
def _composers_own() -> LayerNormClass:
    from composer.algorithms.low_precision_layernorm.low_precision_layernorm import LPLayerNorm

    own: LayerNormClass = LPLayerNorm
    return own


def composer(device: torch.device) -> Contender:
    """Composer's `LPLayerNorm` where it is installed and has an effect, else its recipe.

    It asks whether autocast is enabled without naming a device, which means CUDA.
    """
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            _composers_own()
            return Contender("Composer's LPLayerNorm", _composers_own)
    return Contender("Composer's recipe", lambda: ComposerRecipe)


@functools.cache
def _apex() -> LayerNormClass:
    from lpln_autopatch.backends import apex

    apex.load()  # whether it is NVIDIA's, with its extension
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    def normalise(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if bias is None:
            raise NotImplementedError("apex has no LayerNorm with a weight and no bias")
        y: Tensor = fused_layer_norm_affine(x, weight, bias, shape, eps)
        return y

    return _class_that_calls(normalise)


@functools.cache
def _liger() -> LayerNormClass:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def normalise(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        # Liger's own `functional.layer_norm` does that.
        bias = torch.zeros_like(weight) if bias is None else bias
        y: Tensor = LigerLayerNormFunction.apply(x, weight, bias, eps)
        return y

    return _class_that_calls(normalise)


@functools.cache
def _timm() -> LayerNormClass:
    from timm.layers.fast_norm import fast_layer_norm

    return _class_that_calls(fast_layer_norm)


@functools.cache
def _quack() -> LayerNormClass:
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class Function(torch.autograd.Function):
        """QuACK's two kernels; it has no differentiable LayerNorm of its own."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Any:
            y, rstd, mean = layernorm_fwd(x, weight, bias, eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            ctx.has_bias = bias is not None
            return y

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            x, weight, rstd, mean = ctx.saved_tensors
            return *layernorm_bwd(x, weight, upstream[0], rstd, mean, ctx.has_bias), None

    def normalise(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y: Tensor = Function.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        return y

    return _class_that_calls(normalise)


STOCK = Contender("stock", lambda: Stock)
INERT = Contender("inert")
STOCK_FUNCTION = Contender("stock F.layer_norm", function=lambda: _stock.layer_norm)
INERT_FUNCTION = Contender("inert F.layer_norm", function=lambda: F.layer_norm)
# On CPU fused and apex hand every call to native.
LOWERED = (
    Contender("lowered (native)", backend="native"),
    Contender("lowered (fused)", backend="fused", device_type="cuda"),
    Contender("lowered (apex)", backend="apex", device_type="cuda"),
)
COMPILED = (
    Contender("stock, compiled", lambda: Stock, compiled=True),
    Contender("lowered, compiled", backend="native", compiled=True),
)
OTHERS = (
    Contender("apex", _apex, device_type="cuda"),
    Contender("Liger", _liger, device_type="cuda"),
    Contender("timm fast_layer_norm", _timm),
    Contender("QuACK", _quack, device_type="cuda"),
)
