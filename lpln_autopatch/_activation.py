"""The verbs: enable, disable, low_precision_layernorm, exempt."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from lpln_autopatch import _state
from lpln_autopatch._precision import Precision
from lpln_autopatch._request import Request

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger("lpln_autopatch")
_F = TypeVar("_F", bound=Callable[..., Any])
_Exempt = TypeVar("_Exempt", bound="torch.nn.Module | type[torch.nn.Module]")


def enable(
    precision: str | Precision | torch.dtype = "amp",
    backend: str = "auto",
    norms: str | Iterable[str] | None = None,
) -> Enabled:
    """Lower every LayerNorm call of the process from now on, until `disable`.

    That is every call of `torch.nn.functional.layer_norm`, by `torch.nn.LayerNorm` or anything
    else. A second call replaces the first. An open `low_precision_layernorm` block goes before
    both. Modules that exist already are lowered too, and so is compiled code.

    Args:
        precision: When to lower: "amp" (whatever autocast runs in), "amp_fp16" or
            torch.float16, "amp_bf16", "bf16" or torch.bfloat16. Composer's "fp32", "fp16" and
            "amp_fp8" are accepted and never lower, with a `NoEffectWarning`.
        backend: The backend that normalises: "native", "fused", "lean", "apex", "apex_lean", or
            the name of another package's. "auto" is the value of LPLN_BACKEND, or else native.
            GroupNorm is always native's, and RMSNorm is if the backend has none.
        norms: The norms that are lowered: "layer_norm", "group_norm", "rms_norm", "hand_written"
            (norms that classes compute without PyTorch's functions; like "rms_norm" from torch
            2.4 on), several of them in a list or with commas between them, or "all". The default
            is the value of LPLN_NORMS, or else "layer_norm".

    Returns:
        A context manager for a `with` statement. Lowering begins with the call. At the end of the
        statement the process is as before the call, an activation by LPLN_PRECISION included.

    Raises:
        ValueError: precision, backend or norms is not a valid name; nothing has changed.
        ImportError: the backend cannot be used here; nothing has changed.
        RuntimeError: another patcher hides a function of PyTorch; nothing has changed.
    """
    return Enabled(enable_from(precision, backend, norms, "enable"))


class Enabled:
    """A context manager that restores the base of before `enable` when it ends."""

    def __init__(self, before: Request | None) -> None:
        self._before = before

    def __repr__(self) -> str:
        request = _state.current()
        if request is None or not request.precision.ever_engages:
            return "Nothing is lowered."
        return f"Lowered under autocast: {request}. lpln_autopatch.disable() ends that."

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            _state.set_base(self._before)
        except KeyboardInterrupt:  # perhaps before anything was recorded
            _state.set_base(self._before)
            raise


def disable() -> None:
    """Undo `enable` and LPLN_PRECISION: PyTorch's functions run their own code again.

    An open `low_precision_layernorm` block stays active. PyTorch's functions then have their code
    back when the last block closes. If another patcher has wrapped `torch.nn.LayerNorm.forward`
    after us, its wrapper stays. Ours stays beneath it, does nothing, and a warning says so.
    Without anything to undo, this does nothing.
    """
    _state.set_base(None)


class low_precision_layernorm(contextlib.ContextDecorator):
    """Lower every LayerNorm call of the process inside a `with` block or a decorated function.

    Blocks nest, and the innermost one still open is active, in all threads; an inner
    `low_precision_layernorm("fp32")` switches lowering off. May be entered more than once.

    Args:
        precision: As for `enable`.
        backend: As for `enable`.
        norms: As for `enable`.

    Raises:
        ValueError: precision, backend or norms is not a valid name.
        ImportError: the backend cannot be used here.
        TypeError: it decorates a generator or coroutine function, whose body would run after the
            block had closed, or a class, a module, or an object that cannot be called. Or it is
            used as a decorator without parentheses.
    """

    def __init__(
        self,
        precision: str | Precision | torch.dtype = "amp",
        backend: str = "auto",
        norms: str | Iterable[str] | None = None,
    ) -> None:
        if callable(precision):
            raise TypeError(
                f"low_precision_layernorm got {precision!r} as its precision. "
                "As a decorator it needs parentheses: @low_precision_layernorm()."
            )
        self._request = Request.parse(precision, backend, norms, "block")
        # Threads and tasks of asyncio may share one instance. Each must close its own scope:
        # another block may be open between those of two.
        self._entered: list[tuple[object, _state.Scope]] = []

    def __call__(self, function: _F) -> _F:
        _refuse_what_a_block_cannot_decorate(function)
        return super().__call__(function)

    def __enter__(self) -> None:
        # An inner block that never engages has an effect: it switches lowering off.
        if not self._request.precision.ever_engages:
            outer = _state.current()
            if outer is None or not outer.precision.ever_engages:
                self._request.warn_never_engages(stacklevel=2)
        entry = _who(), _state.Scope(self._request)
        try:
            entry[1].open()
            self._entered.append(entry)
        except BaseException:
            self._leave(entry)
            raise

    def __exit__(self, *exc_info: object) -> None:
        entry = None
        try:
            entry = self._last_entry()
            self._leave(entry)
        except KeyboardInterrupt:
            self._leave(entry or self._last_entry())
            raise

    def _last_entry(self) -> tuple[object, _state.Scope]:
        """Return the last entry of this thread or task, or the last of all if it has none."""
        who = _who()
        for entry in reversed(self._entered):
            if entry[0] == who:
                return entry
        return self._entered[-1]

    def _leave(self, entry: tuple[object, _state.Scope]) -> None:
        if entry in self._entered:  # an interruption may have come after this was removed
            self._entered.remove(entry)
        entry[1].close()


def exempt(module: _Exempt, exempt: bool = True) -> _Exempt:
    """Keep `module`, and every module that is inside it now, stock.

    Use it for a norm that needs float32, such as the last one of a model that spikes. It covers
    every norm that `module(x)` calls in its thread. The mark survives deepcopy and pickling, is no
    part of the state_dict, and compiled code follows it. A class stands for all instances of it
    and of its subclasses, made before or later.

    It does not cover `module.forward(x)` or other methods, except the forwards of norms. In other
    threads it covers the marked modules alone. It uses forward hooks (from torch 2.1 on), which
    TorchScript compiles if the forward takes and returns one tensor.

    Args:
        module: A norm, any module that contains some, or a class of modules.
        exempt: False removes the marks again, those of LPLN_EXEMPT included.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is neither a `torch.nn.Module` nor a class of them.
    """
    import torch

    from lpln_autopatch import _exemption

    if isinstance(module, torch.nn.Module):
        _exemption.mark(module, bool(exempt))
    elif isinstance(module, type) and issubclass(module, torch.nn.Module):
        _exemption.mark_class(module, bool(exempt))
    else:
        raise TypeError(f"exempt() takes a torch.nn.Module or a class of them, not {module!r}.")
    return module


def enable_from(precision: object, backend: str, norms: object, source: str) -> Request | None:
    """Enable on behalf of `source`; return the request that was the base before."""
    request = Request.parse(precision, backend, norms, source)
    if not request.precision.ever_engages:
        request.warn_never_engages(stacklevel=3)
    before = _state.set_base(request)
    _logger.info("%s, from %s", request, source)
    return before


def _who() -> object:
    """Return the current task of asyncio, or else the number of this thread."""
    asyncio = sys.modules.get("asyncio")  # importing it takes long, and without it there is no task
    try:
        task = asyncio.current_task() if asyncio is not None else None
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident() if task is None else task


def _refuse_what_a_block_cannot_decorate(decorated: object) -> None:
    """Raise a TypeError if the block would not be open while `decorated` works."""
    import torch

    inspects = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_one(decorated) for is_one in inspects):
        what = (
            f"{decorated!r}, whose body runs after the call has returned and the block has "
            "closed. Use a `with` block inside it."
        )
    elif inspect.isclass(decorated):
        what = (
            f"the class {decorated.__qualname__}: only making an instance would be inside the "
            "block. Decorate its `forward`, or use a `with` block."
        )
    elif isinstance(decorated, torch.nn.Module):
        what = (
            f"a module, {type(decorated).__qualname__}. Use a `with` block around its calls, or "
            "apply_low_precision_layernorm(module)."
        )
    elif not callable(decorated):
        what = f"{decorated!r}, which cannot be called. Decorate a function, or use a `with` block."
    else:
        return
    raise TypeError(f"low_precision_layernorm decorates {what}")
