"""Who asked for what, in which order, and which request is in force: the state of the process.

torch is imported by what needs it, not by this module: with LPLN_PRECISION set, importing torch
comes back here, and must find a module that is whole.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lpln_autopatch.precision import NoEffectWarning, Precision

if TYPE_CHECKING:
    from lpln_autopatch.backends import Backend
    from lpln_autopatch.forward import Lowering


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody asked for.

    Attributes:
        precision: When LayerNorm is lowered.
        backend: The name of what normalises, as it was chosen: never "auto".
        normalise: What normalises.
        source: "environment", "enable", "block" or "surgery".
    """

    precision: Precision
    backend: str
    normalise: Backend
    source: str

    @classmethod
    def parse(cls, precision: object, backend: str, source: str, argument: str) -> Request:
        """The request that these names make; `argument` is where `precision` came from.

        Raises:
            ValueError: precision or backend is not a valid name.
            ImportError: the backend cannot be used here.
        """
        # Before our own modules that import it: if this is its first import and LPLN_PRECISION
        # is set, it comes back to us, and must not find one of them half imported.
        import torch  # noqa: F401

        from lpln_autopatch import backends

        parsed = Precision.parse(precision, argument)
        return cls(parsed, *backends.resolve(backend, parsed), source)

    def lowering(self) -> Lowering:
        """What the hot path reads while this request is in force."""
        import torch

        from lpln_autopatch.forward import Lowering

        dtypes = (d for d in (torch.float16, torch.bfloat16) if self.precision.engages(d))
        return Lowering(str(self.precision), tuple(dtypes), self.normalise)

    def warn_never_engages(self, stacklevel: int) -> None:
        """Say that this request lowers nothing."""
        warnings.warn(
            f"precision {str(self.precision)!r} never engages: LayerNorm stays as PyTorch has it. "
            "Use 'amp', 'amp_fp16' or 'amp_bf16' to run it in the autocast dtype.",
            NoEffectWarning,
            stacklevel=stacklevel + 1,
        )


# Process-wide, not thread-local: autograd recomputes checkpoints in threads of its own.
_base: Request | None = None
# In the order of entry. None is a recomputation whose forward ran with nothing in force.
_blocks: dict[object, Request | None] = {}
# Whether the wrapper stays, inert, once nothing is in force: from the first request until the
# base is cleared. Entering and leaving blocks in a loop must not patch, and compile, every time.
_keep_wrapper = False
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# A child forked while another thread holds the lock would wait for that thread forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def current() -> Request | None:
    """The request in force: the innermost open block's, or else the base."""
    with _lock:
        return next(reversed(_blocks.values())) if _blocks else _base


def set_base(request: Request) -> None:
    """Put `request` in force wherever no block is open, in place of the last one."""
    global _base, _keep_wrapper
    with _lock:
        _prepare(request)
        _base, _keep_wrapper = request, True
        _apply()


def clear_base() -> None:
    """Leave nothing in force but the open blocks, and no wrapper after the last of them."""
    global _base, _keep_wrapper
    with _lock:
        _base, _keep_wrapper = None, False
        _apply()


def enter(request: Request | None, keep_wrapper: bool) -> object:
    """Open a block: `request` is in force until it is left or another one is entered.

    Args:
        request: What is in force inside; None for nothing.
        keep_wrapper: Whether the wrapper may stay after this block, inert.

    Returns:
        The token that `leave` takes.
    """
    global _keep_wrapper
    token = object()
    with _lock:
        _prepare(request)
        # Not in an open block: if the base was cleared there, the wrapper goes with the last one.
        if not _blocks:
            _keep_wrapper = _keep_wrapper or keep_wrapper
        _blocks[token] = request
        _apply()
    return token


def leave(token: object, warn: bool = True) -> None:
    """Close the block that `enter` gave `token` for, in whatever order.

    Args:
        token: What `enter` gave.
        warn: Whether to say so if the wrapper has to go now and cannot.
    """
    with _lock:
        del _blocks[token]
        _apply(warn)


@dataclasses.dataclass(frozen=True)
class Carried:
    """A function that runs under the request that was in force elsewhere, or under none.

    For a checkpoint's recomputation, which must repeat its forward, and may happen outside the
    block that the forward ran in, or after the base was cleared.
    """

    function: Callable[..., Any]
    request: Request | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Even if that is in force already: what it is in force by may end before this does.
        token = enter(self.request, keep_wrapper=False)
        try:
            return self.function(*args, **kwargs)
        finally:
            # disable() has warned its caller; backward has nothing to do with it.
            leave(token, warn=False)


def _prepare(request: Request | None) -> None:
    """Do what can fail before anything is recorded: a refused request changes nothing."""
    if request is not None and request.precision.ever_engages:
        from lpln_autopatch import patch

        patch.install()


def _apply(warn: bool = True) -> None:
    """Make the hot path and the patch follow what is recorded. Called with the lock held."""
    from lpln_autopatch import forward, patch, torch_compat

    request, active = current(), None
    if request is not None and request.precision.ever_engages:
        active = request.lowering()
    if active != forward.active:
        forward.active = active
        torch_compat.drop_code_that_cannot_follow()
    if _base is None and not _blocks and not _keep_wrapper:
        patch.remove(warn)
