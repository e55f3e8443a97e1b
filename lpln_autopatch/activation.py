"""The verbs: enable, disable, low_precision_layernorm, exempt, status."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import platform
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lpln_autopatch import state
from lpln_autopatch.precision import Precision
from lpln_autopatch.state import Request

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger("lpln_autopatch")
_F = TypeVar("_F", bound=Callable[..., Any])
_M = TypeVar("_M", bound="torch.nn.Module")


def enable(precision: str | Precision | torch.dtype = "amp", backend: str = "auto") -> None:
    """Lower every LayerNorm call of the process from now on, until `disable`.

    Calling it again replaces precision and backend. An open `low_precision_layernorm` block
    goes before it. Modules that exist already are lowered too, and so is code that
    `torch.compile` compiled before. A class with a `forward` of its own is left alone.

    Args:
        precision: When to lower: "amp" (whatever autocast runs in), "amp_fp16" or
            torch.float16, "amp_bf16", "bf16" or torch.bfloat16. Composer's "fp32", "fp16" and
            "amp_fp8" are accepted and never lower, with a `NoEffectWarning`.
        backend: What normalises: "native", "fused", "apex", the name of a backend that another
            package brings, or "auto": what LPLN_BACKEND says, or else native.

    Raises:
        ValueError: precision or backend is not a valid name; nothing has changed.
        ImportError: the backend cannot be used here; nothing has changed.
    """
    enable_from(precision, backend, "enable", "precision")


def disable() -> None:
    """Undo `enable` and LPLN_PRECISION, and take the wrapper off `LayerNorm.forward`.

    An open `low_precision_layernorm` block stays in force; the wrapper then goes when the last
    block closes. A wrapper that somebody else put on top of ours is never removed: ours stays
    beneath it, inert, and a warning says so. Does nothing if there is nothing to undo.
    """
    state.clear_base()


class low_precision_layernorm(contextlib.ContextDecorator):
    """Lower every LayerNorm call of the process inside a `with` block or a decorated function.

    Blocks nest, and the innermost one still open is in force, in all threads; an inner
    `low_precision_layernorm("fp32")` switches lowering off. May be entered more than once.

    Args:
        precision: As for `enable`.
        backend: As for `enable`.

    Raises:
        ValueError: precision or backend is not a valid name.
        ImportError: the backend cannot be used here.
        TypeError: what it decorates is a generator or coroutine function: its body would run
            after the block had closed. Or it is used as a decorator without parentheses.
    """

    def __init__(
        self, precision: str | Precision | torch.dtype = "amp", backend: str = "auto"
    ) -> None:
        if inspect.isroutine(precision):
            raise TypeError(
                f"low_precision_layernorm got {precision!r} as its precision. "
                "As a decorator it needs parentheses: @low_precision_layernorm()."
            )
        self._request = Request.parse(precision, backend, "block", "precision")
        # Threads that share one instance must each leave what they entered.
        self._entered: list[tuple[int, object]] = []

    def __call__(self, function: _F) -> _F:
        if _runs_its_body_later(function):
            raise TypeError(
                f"low_precision_layernorm decorates {function!r}, whose body runs after the call "
                "has returned and the block has closed. Use a `with` block inside it."
            )
        return super().__call__(function)

    def __enter__(self) -> None:
        # An inner block of that kind has an effect: it switches lowering off.
        if not self._request.precision.ever_engages:
            outer = state.current()
            if outer is None or not outer.precision.ever_engages:
                self._request.warn_never_engages(stacklevel=2)
        token = state.enter(self._request, keep_wrapper=True)
        self._entered.append((threading.get_ident(), token))

    def __exit__(self, *exc_info: object) -> None:
        # The last of this thread's; if another thread entered, the last of all.
        thread = threading.get_ident()
        mine = [entry for entry in self._entered if entry[0] == thread] or self._entered
        entry = mine[-1]
        self._entered.remove(entry)
        state.leave(entry[1])


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
    from lpln_autopatch.torch_compat import drop_code_that_cannot_follow

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"exempt() takes a torch.nn.Module, not {type(module)}.")
    for submodule in module.modules():
        if exempt:
            setattr(submodule, EXEMPT, True)
        elif EXEMPT in vars(submodule):
            delattr(submodule, EXEMPT)
    drop_code_that_cannot_follow()
    return module


@dataclasses.dataclass(frozen=True)
class Status:
    """What is in force, and where it came from. Prints as a table.

    Attributes:
        precision: The precision in force, or None.
        backend: What normalises, or None.
        source: "environment", "enable" or "block", or None.
        installed: Whether our wrapper is on `torch.nn.LayerNorm.forward`, active or inert.
        environment: LPLN_PRECISION as it is set now, or None. With a precision here and none in
            force, no route has read it: see docs/activation.md.
        versions: Of lpln_autopatch, torch, wrapt and python.
    """

    precision: Precision | None
    backend: str | None
    source: str | None
    installed: bool
    environment: str | None
    versions: dict[str, str]

    def __str__(self) -> str:
        rows = {**vars(self), "versions": ", ".join(f"{k} {v}" for k, v in self.versions.items())}
        return "\n".join(f"{name:12} {value}" for name, value in rows.items())


def status() -> Status:
    """What is in force now, where it came from, and whether the wrapper is installed.

    Returns:
        A snapshot, which prints as a table.
    """
    import torch  # first, for the reason that Request.parse gives
    from importlib_metadata import version

    from lpln_autopatch import __version__, patch

    request = state.current()
    return Status(
        precision=request.precision if request else None,
        backend=request.backend if request else None,
        source=request.source if request else None,
        installed=patch.is_installed(),
        environment=os.environ.get("LPLN_PRECISION"),
        versions={
            "lpln_autopatch": __version__,
            "torch": str(torch.__version__),
            "wrapt": version("wrapt"),
            "python": platform.python_version(),
        },
    )


def enable_from(precision: object, backend: str, source: str, argument: str) -> None:
    """`enable`, on behalf of `source`.

    Args:
        precision: As for `enable`.
        backend: As for `enable`.
        source: "environment" or "enable", for `status`.
        argument: What `precision` came from, for the error: an argument or a variable.
    """
    request = Request.parse(precision, backend, source, argument)
    if not request.precision.ever_engages:
        request.warn_never_engages(stacklevel=3)
    state.set_base(request)
    _logger.info(
        "LayerNorm: precision %s, backend %s, from %s",
        request.precision,
        request.backend,
        request.source,
    )


def _runs_its_body_later(function: Callable[..., Any]) -> bool:
    return (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    )
