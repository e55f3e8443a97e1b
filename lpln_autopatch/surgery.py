"""Surgery: lower the LayerNorms of one model by changing their class, and nothing else."""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch

# TorchScript resolves the names in LayerNorm.forward's source here; see _norms.py.
import torch.nn.functional as F  # noqa: F401
from torch import Tensor
from torch.overrides import handle_torch_function

from lpln_autopatch._exemption import EXEMPT, is_exempt
from lpln_autopatch._forward import INTERCEPTED, decide_and_count, run_backend
from lpln_autopatch._precision import NoEffectWarning, Precision
from lpln_autopatch._request import Request
from lpln_autopatch._torch_compat import traced_like_torchs_own

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from torch.optim import Optimizer


class LPLayerNorm(torch.nn.LayerNorm):
    """A LayerNorm that runs in the autocast dtype by itself, with or without `enable`.

    It takes the arguments of `torch.nn.LayerNorm`, and two more.

    Args:
        precision: As for `enable`.
        backend: As for `enable`.

    Shape:
        As for `torch.nn.LayerNorm`. The output of a lowered call has the autocast dtype of the
        input's device. docs/how-it-works.md has the rules.

    Raises:
        ValueError: precision or backend is not a valid name.
        ImportError: the backend cannot be used here.

    Source:
        MosaicML Composer, `LPLayerNorm`; differs in: `bias`, CPU autocast, no early rounding there.
    """

    def __init__(
        self,
        *args: Any,
        precision: str | Precision | torch.dtype = "amp",
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._request = _parse(precision, backend)

    def forward(self, input: Tensor) -> Tensor:
        request = getattr(self, "_request", None)
        if request is None:
            # Surgery was reverted, but a hook has kept this forward. `self` is no LPLayerNorm any
            # more, so that super() would fail.
            return torch.nn.LayerNorm.forward(self, input)
        dtype, reason = None, EXEMPT
        if not is_exempt(self):
            dtype, reason = decide_and_count(request, "layer_norm", input, self.weight)
        arguments = (input, self.normalized_shape, self.weight, self.bias, self.eps)
        if reason == INTERCEPTED:
            # The mode or the subclass calls this again.
            both = (input, self.weight)
            return handle_torch_function(LPLayerNorm.forward, both, self, input)
        if dtype is None:
            # The operator, and not F.layer_norm, which the active request would lower.
            return torch.layer_norm(*arguments)
        return run_backend(request, "layer_norm", *arguments, dtype)

    # TorchScript compiles the source of PyTorch's forward in place of ours.
    forward.__wrapped__ = inspect.unwrap(torch.nn.LayerNorm.forward)  # type: ignore[attr-defined]

    def __getstate__(self) -> tuple[tuple[str, str], Any]:
        # The names in the request, and no backend: it may be missing where this is loaded.
        request, above = self._request, super()
        # until Python 3.11: object has no __getstate__
        state = above.__getstate__() if hasattr(above, "__getstate__") else vars(self)
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != "_request"}
        return (str(request.precision), request.backend), state

    def __setstate__(self, state: tuple[tuple[str, str], Any]) -> None:
        names, others = state
        super().__setstate__(others)  # type: ignore[no-untyped-call]
        self._request = Request.again(*names)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        original = vars(type(self)).get("_original")
        if original is None:
            return reduced
        # The class was made at run time: pickle cannot find it by its name.
        return (_new_instance, (original,), *reduced[2:])


def apply_low_precision_layernorm(
    model: torch.nn.Module,
    precision: str | Precision | torch.dtype = "amp",
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
    backend: str = "auto",
) -> dict[str, torch.nn.LayerNorm]:
    """Lower the LayerNorms that are in `model` now, in place, and no others.

    Each keeps everything but its class: parameters, hooks, sharing, names, training flag. So DDP
    wrappers, compiled code and optimizers stay valid. Subclasses that inherit LayerNorm's forward
    are lowered too. A class or an instance with a `forward` of its own is left alone. A second call
    replaces precision and backend.

    Args:
        model: The module to change; it may be a LayerNorm itself.
        precision: As for `enable`; also Composer's `Precision` members.
        optimizers: Ignored: the parameters stay the same objects. Composer has this argument.
        backend: As for `enable`.

    Returns:
        The lowered modules by qualified name; "" is `model` itself.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: precision or backend is not a valid name; nothing has changed.
        ImportError: the backend cannot be used here; nothing has changed.
        Exception: a subclass of LayerNorm refuses to be subclassed; nothing has changed.

    Source:
        MosaicML Composer, `apply_low_precision_layernorm`; differs in: the class is changed and
        no module is replaced; it returns the same type on every path.
    """
    del optimizers
    check_is_module(model, "apply_low_precision_layernorm")
    request = _parse(precision, backend)
    if not request.precision.ever_engages:
        revert_low_precision_layernorm(model)
        for norm in model.modules():
            if isinstance(norm, LPLayerNorm):  # of a class that a user has derived from it
                norm._request = request
        return {}
    norms = [module for module in model.modules() if runs_torchs_forward(module)]
    # Make all classes before a module changes: a class may refuse to be subclassed.
    classes = [_low_precision_class(type(norm)) for norm in norms]
    for norm, cls in zip(norms, classes, strict=True):
        norm.__class__ = cls
    changed: dict[str, torch.nn.LayerNorm]
    changed = {name: m for name, m in model.named_modules() if isinstance(m, LPLayerNorm)}
    for norm in changed.values():
        vars(norm)["_request"] = request
    if not changed:
        warnings.warn(
            f"No LayerNorm that runs torch.nn.LayerNorm.forward was found in {type(model)}: "
            "nothing is lowered. One with a forward of its own is left alone.",
            NoEffectWarning,
            stacklevel=2,
        )
    return changed


def revert_low_precision_layernorm(model: torch.nn.Module) -> dict[str, torch.nn.LayerNorm]:
    """Undo `apply_low_precision_layernorm` in `model`, and give each module its class back.

    Args:
        model: The module to change.

    Returns:
        The modules that were lowered, by qualified name.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    check_is_module(model, "revert_low_precision_layernorm")
    changed: dict[str, torch.nn.LayerNorm] = {}
    for name, module in model.named_modules():
        original = _original_class(type(module))
        if original is not None:
            module.__class__ = original
            del module._request
            changed[name] = cast(torch.nn.LayerNorm, module)
    return changed


def _parse(precision: object, backend: str) -> Request:
    request = Request.parse(precision, backend, "layer_norm", "surgery")
    if not request.precision.ever_engages:
        request.warn_never_engages(stacklevel=3)
    return request


def check_is_module(model: object, function: str) -> None:
    """Raise a TypeError if `model`, an argument of `function`, is no module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}() takes a torch.nn.Module, not {type(model)}.")


def is_under_surgery(module: torch.nn.Module) -> bool:
    """Return True if `module` lowers its calls by itself."""
    return isinstance(module, LPLayerNorm) and getattr(module, "_request", None) is not None


def runs_torchs_forward(module: torch.nn.Module) -> TypeGuard[torch.nn.LayerNorm]:
    """Return True if `module` is a LayerNorm that runs the present `torch.nn.LayerNorm.forward`."""
    return (
        isinstance(module, torch.nn.LayerNorm)
        and type(module).forward is torch.nn.LayerNorm.forward
        and "forward" not in vars(module)
    )


# Dynamo then treats an LPLayerNorm as it treats a LayerNorm.
traced_like_torchs_own(LPLayerNorm.forward, torch.nn.modules.normalization)

# Weak: a parametrization makes a class for each module, and our class for it must go with it.
_classes: MutableMapping[type[torch.nn.LayerNorm], type[LPLayerNorm]]
_classes = weakref.WeakValueDictionary({torch.nn.LayerNorm: LPLayerNorm})


def _low_precision_class(original: type[torch.nn.LayerNorm]) -> type[LPLayerNorm]:
    """Return LPLayerNorm, or for a subclass of LayerNorm a class that derives from both."""
    made = _classes.get(original)
    if made is None:
        members = {"_original": original, "__module__": original.__module__}
        made = type(f"LP{original.__name__}", (LPLayerNorm, original), members)
        _classes[original] = made
    return made


def _new_instance(original: type[torch.nn.LayerNorm]) -> LPLayerNorm:
    cls = _low_precision_class(original)
    return cls.__new__(cls)


def _original_class(cls: type[torch.nn.Module]) -> type[torch.nn.LayerNorm] | None:
    """Return the class from which surgery made `cls`, or None for any other class.

    A user's own subclass of LPLayerNorm is such another class.
    """
    return torch.nn.LayerNorm if cls is LPLayerNorm else vars(cls).get("_original")
