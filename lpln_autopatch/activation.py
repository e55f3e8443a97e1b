"""Who asked for what: the process-wide base, the open blocks, and which of them is in force.

torch is imported by what needs it, not by this module: with LPLN_PRECISION set, importing torch
calls `enable` here, and must find a module that is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import platform
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lpln_autopatch.precision import NoEffectWarning, Precision

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger("lpln_autopatch")
_F = TypeVar("_F", bound=Callable[..., Any])
_M = TypeVar("_M", bound="torch.nn.Module")


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody asked for.

    Attributes:
        precision: When LayerNorm is lowered.
        backend: What normalises, as it was chosen: never "auto".
        source: "environment", "enable" or "block".
    """

    precision: Precision
    backend: str
    source: str


# Process-wide, not thread-local: autograd recomputes checkpoints in threads of its own.
_base: Request | None = None
# In the order of entry. None is a recomputation whose forward ran with nothing in force.
_blocks: dict[object, Request | None] = {}
# Whether the wrapper stays, inert, once nothing is in force: from the first request until
# disable(). Entering and leaving blocks in a loop must not patch, and compile, again and again.
_keep_wrapper = False
_lock = threading.RLock()
# A child forked while another thread holds the lock would wait for that thread forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


def enable(precision: str | Precision | torch.dtype = "amp", backend: str = "auto") -> None:
    """Lower every LayerNorm call of the process from now on, until `disable`.

    Calling it again replaces precision and backend. An open `low_precision_layernorm` block
    goes before it. Modules that exist already are lowered too, and so is code that
    `torch.compile` compiled before. A class with a `forward` of its own is left alone.

    Args:
        precision: When to lower: "amp" (whatever autocast runs in), "amp_fp16" or
            torch.float16, "amp_bf16", "bf16" or torch.bfloat16. Composer's "fp32", "fp16" and
            "amp_fp8" are accepted and never lower, with a `NoEffectWarning`.
        backend: What normalises: "auto" or "native".

    Raises:
        ValueError: precision or backend is not a valid name; nothing has changed.
    """
    set_base(precision, backend, "enable", "precision")


def disable() -> None:
    """Undo `enable` and LPLN_PRECISION, and take the wrapper off `LayerNorm.forward`.

    An open `low_precision_layernorm` block stays in force; the wrapper then goes when the last
    block closes. A wrapper that somebody else put on top of ours is never removed: ours stays
    beneath it, inert, and a warning says so. Does nothing if there is nothing to undo.
    """
    global _base, _keep_wrapper
    with _lock:
        _base, _keep_wrapper = None, False
        _apply()


class low_precision_layernorm(contextlib.ContextDecorator):
    """Lower every LayerNorm call of the process inside a `with` block or a decorated function.

    Blocks nest, and the innermost one still open is in force, in all threads; an inner
    `low_precision_layernorm("fp32")` switches lowering off. May be entered more than once.

    Args:
        precision: As for `enable`.
        backend: As for `enable`.

    Raises:
        ValueError: precision or backend is not a valid name.
        TypeError: what it decorates is a generator or coroutine function: its body would run
            after the block had closed.
    """

    def __init__(
        self, precision: str | Precision | torch.dtype = "amp", backend: str = "auto"
    ) -> None:
        self._request = _request(precision, backend, "block", "precision")
        # By thread: threads that share one instance must each leave what they entered.
        self._tokens: dict[int, list[object]] = {}

    def __call__(self, function: _F) -> _F:
        if _runs_its_body_later(function):
            raise TypeError(
                f"low_precision_layernorm decorates {function!r}, whose body runs after the call "
                "has returned and the block has closed. Use a `with` block inside it."
            )
        return super().__call__(function)

    def __enter__(self) -> None:
        # An inner block of that kind has an effect: it switches lowering off.
        if not _engages(self._request) and not _engages(current()):
            _warn_never_engages(self._request, stacklevel=3)
        token = _enter(self._request, keep_wrapper=True)
        self._tokens.setdefault(threading.get_ident(), []).append(token)

    def __exit__(self, *exc_info: object) -> None:
        _leave(self._tokens[threading.get_ident()].pop())


def exempt(module: _M, exempt: bool = True) -> _M:
    """Keep `module`, and every module that is inside it now, as PyTorch has it.

    For the final norm of a model that spikes. The mark survives deepcopy and pickling, is no
    part of the state_dict, and compiled code follows it.

    Args:
        module: A LayerNorm, or any module that contains some.
        exempt: False takes the marks off again.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is not a `torch.nn.Module`.
    """
    import torch

    from lpln_autopatch.forward import EXEMPT

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"exempt() takes a torch.nn.Module, not {module!r}.")
    for submodule in module.modules():
        if exempt:
            setattr(submodule, EXEMPT, True)
        elif EXEMPT in vars(submodule):
            delattr(submodule, EXEMPT)
    return module


@dataclasses.dataclass(frozen=True)
class Status:
    """What is in force, and where it came from. Prints as a table.

    Attributes:
        precision: The precision in force, or None.
        backend: What normalises, or None.
        source: "environment", "enable" or "block", or None.
        installed: Whether our wrapper is on `torch.nn.LayerNorm.forward`, active or inert.
        versions: Of lpln_autopatch, torch, wrapt and python.
    """

    precision: Precision | None
    backend: str | None
    source: str | None
    installed: bool
    versions: dict[str, str]

    def __str__(self) -> str:
        rows = {**vars(self), "versions": ", ".join(f"{k} {v}" for k, v in self.versions.items())}
        return "\n".join(f"{name:10} {value}" for name, value in rows.items())


def status() -> Status:
    """What is in force now, where it came from, and whether the wrapper is installed."""
    import torch  # first, for the reason that _request gives
    from importlib_metadata import version

    from lpln_autopatch import __version__, patch

    request = current()
    return Status(
        precision=request.precision if request else None,
        backend=request.backend if request else None,
        source=request.source if request else None,
        installed=patch.is_installed(),
        versions={
            "lpln_autopatch": __version__,
            "torch": str(torch.__version__),
            "wrapt": version("wrapt"),
            "python": platform.python_version(),
        },
    )


def set_base(precision: object, backend: str, source: str, argument: str) -> None:
    """`enable`, for a caller that is not the user's code.

    Args:
        precision: As for `enable`.
        backend: As for `enable`.
        source: "environment" or "enable", for `status`.
        argument: What `precision` came from, for the error: an argument or a variable.
    """
    global _base, _keep_wrapper
    request = _request(precision, backend, source, argument)
    if not _engages(request):
        _warn_never_engages(request, stacklevel=4)
    with _lock:
        _prepare(request)
        _base, _keep_wrapper = request, True
        _apply()
    _logger.info(
        "LayerNorm: precision %s, backend %s, from %s",
        request.precision,
        request.backend,
        request.source,
    )


def current() -> Request | None:
    """The request in force: the innermost open block's, or else the base."""
    with _lock:
        return next(reversed(_blocks.values())) if _blocks else _base


@dataclasses.dataclass(frozen=True)
class Carried:
    """A function that runs under the request that was in force elsewhere, or under none.

    For a checkpoint's recomputation, which must repeat its forward, and may happen outside the
    block that the forward ran in, or after `disable`.
    """

    function: Callable[..., Any]
    request: Request | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current() == self.request:
            return self.function(*args, **kwargs)
        token = _enter(self.request, keep_wrapper=False)
        try:
            return self.function(*args, **kwargs)
        finally:
            _leave(token)


def _enter(request: Request | None, keep_wrapper: bool) -> object:
    global _keep_wrapper
    token = object()
    with _lock:
        _prepare(request)
        # Inside an open block after disable(), the wrapper still goes when the last one closes.
        if not _blocks:
            _keep_wrapper = _keep_wrapper or keep_wrapper
        _blocks[token] = request
        _apply()
    return token


def _leave(token: object) -> None:
    with _lock:
        del _blocks[token]
        _apply()


def _request(precision: object, backend: str, source: str, argument: str) -> Request:
    # Before our own modules that import it: if this is its first import and LPLN_PRECISION is
    # set, it calls us from within, and must not find one of them half imported.
    import torch  # noqa: F401

    from lpln_autopatch import backends

    return Request(Precision.parse(precision, argument), backends.resolve(backend)[0], source)


def _prepare(request: Request | None) -> None:
    """Do what can fail before anything is recorded: a refused request changes nothing."""
    from lpln_autopatch import patch

    if _engages(request):
        patch.install()


def _apply() -> None:
    """Make the patch follow what is recorded. Called with the lock held."""
    import torch

    from lpln_autopatch import backends, forward, patch

    request = current()
    if request is None or not _engages(request):
        forward.active = None
    else:
        dtypes = tuple(d for d in (torch.float16, torch.bfloat16) if request.precision.engages(d))
        _, backend = backends.resolve(request.backend)
        forward.active = forward.Lowering(str(request.precision), dtypes, backend)
    if _base is None and not _blocks and not _keep_wrapper:
        patch.remove()


def _engages(request: Request | None) -> bool:
    return request is not None and request.precision.ever_engages


def _warn_never_engages(request: Request, stacklevel: int) -> None:
    warnings.warn(
        f"precision {str(request.precision)!r} never engages: LayerNorm stays as PyTorch has it. "
        "Use 'amp', 'amp_fp16' or 'amp_bf16' to run it in the autocast dtype.",
        NoEffectWarning,
        stacklevel=stacklevel,
    )


def _runs_its_body_later(function: Callable[..., Any]) -> bool:
    return (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    )
