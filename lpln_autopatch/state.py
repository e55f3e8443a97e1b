"""Who asked for what, in which order, and which request is in force: the state of the process.

torch is imported by what needs it, not by this module: with LPLN_PRECISION set, importing torch
comes back here, and must find a module that is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from lpln_autopatch.precision import NoEffectWarning, Precision

if TYPE_CHECKING:
    from lpln_autopatch.backends import Backend
    from lpln_autopatch.forward import Lowering
    from lpln_autopatch.patch import Patches


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody asked for.

    Attributes:
        precision: When norms are lowered.
        backend: The name of what normalises, as it was chosen: never "auto".
        normalise: What normalises.
        norms: The names of the norms that are lowered.
        source: "environment", "enable", "block" or "surgery".
    """

    precision: Precision
    backend: str
    normalise: Backend
    norms: tuple[str, ...]
    source: str

    @classmethod
    def parse(
        cls, precision: object, backend: str, norms: object, source: str, argument: str
    ) -> Request:
        """The request that these names make; `argument` is where `precision` came from.

        Raises:
            ValueError: precision, backend or norms is not a valid name.
            ImportError: the backend cannot be used here.
        """
        # Before our own modules that import it: if this is its first import and LPLN_PRECISION
        # is set, it comes back to us, and must not find one of them half imported.
        import torch  # noqa: F401

        from lpln_autopatch import backends
        from lpln_autopatch import norms as known_norms

        parsed = Precision.parse(precision, argument)
        named = known_norms.resolve(norms)
        return cls(parsed, *backends.resolve(backend, parsed), named, source)

    @functools.cached_property
    def lowering(self) -> Lowering:
        """What the hot path reads while this request is in force."""
        import torch

        from lpln_autopatch.forward import Lowering

        dtypes = tuple(d for d in (torch.float16, torch.bfloat16) if self.precision.engages(d))
        return Lowering(str(self.precision), dtypes, self.norms, self.normalise)

    def warn_never_engages(self, stacklevel: int) -> None:
        """Say that this request lowers nothing."""
        warnings.warn(
            f"precision {str(self.precision)!r} never engages: norms stay as PyTorch has them. "
            "Use 'amp', 'amp_fp16' or 'amp_bf16' to run them in the autocast dtype.",
            NoEffectWarning,
            stacklevel=stacklevel + 1,
        )


# Process-wide, not thread-local: autograd recomputes checkpoints in threads of its own.
_base: Request | None = None
# In the order of entry. None is a recomputation whose forward ran with nothing in force.
_blocks: dict[object, Request | None] = {}
# Whether the wrappers stay, inert, once nothing is in force: from the first request until the
# base is cleared. Entering and leaving blocks in a loop must not patch every time.
_keep_wrappers = False

# Nothing is imported, compiled or told to the user while it is held. Reentrant, because the garbage
# collector may close a block in the middle of a change: the change around it then follows both.
_lock = threading.RLock()
_open_changes = 0
_revision = 0


def _renew_lock() -> None:
    global _lock, _open_changes
    _lock, _open_changes = threading.RLock(), 0


# A child forked while another thread holds the lock would wait for that thread forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def current() -> Request | None:
    """The request in force: the innermost open block's, or else the base."""
    with _lock:
        blocks = list(_blocks.values())
        return blocks[-1] if blocks else _base


def set_base(request: Request) -> None:
    """Put `request` in force wherever no block is open, in place of the last one."""
    global _base, _keep_wrappers
    with _change():
        _install_for(request)
        _base, _keep_wrappers = request, True


def clear_base() -> None:
    """Leave nothing in force but the open blocks, and no wrapper after the last of them."""
    global _base, _keep_wrappers
    with _change():
        _base, _keep_wrappers = None, False


def enter(request: Request, token: object) -> None:
    """Open a block: `request` is in force until it is left or another one is entered.

    Args:
        request: What is in force inside.
        token: What `leave` takes.
    """
    global _keep_wrappers
    with _change():
        _install_for(request)
        # Not in an open block: if the base was cleared there, the wrappers go with the last one.
        if not _blocks:
            _keep_wrappers = True
        _blocks[token] = request


def leave(token: object) -> None:
    """Close the block that was entered with `token`, in whatever order."""
    with _change():
        _blocks.pop(token, None)


def _capture() -> Callable[[], AbstractContextManager[None]]:
    """What opens a block of what is in force in this thread now, for a recomputation."""
    from lpln_autopatch import exemption

    return functools.partial(_again, None if exemption.is_exempt_now() else current())


@contextlib.contextmanager
def _again(request: Request | None) -> Iterator[None]:
    from lpln_autopatch import forward

    token = object()
    # disable() has warned of wrappers that cannot go; backward has nothing to do with it.
    with _change(warn=False):
        if request is not None and request.lowering != forward.active:
            _install_for(request)  # they may be gone since
        _blocks[token] = request
    try:
        yield
    finally:
        with _change(warn=False):
            _blocks.pop(token, None)


def is_installed() -> bool:
    """Whether our wrappers are on the norms, active or inert."""
    with _lock:
        return _patches().are_on()


@functools.cache
def _patches() -> Patches:
    from lpln_autopatch.patch import Patches

    return Patches(_capture, functools.partial(_again, None))


def _install_for(request: Request) -> None:
    """What can fail, before anything is recorded: a refused request changes nothing."""
    if request.precision.ever_engages:
        _patches().install(request.norms)


@contextlib.contextmanager
def _change(warn: bool = True) -> Iterator[None]:
    """Hold the lock while the state changes, then have the hot path and the wrappers follow.

    Args:
        warn: Whether to say so if the wrappers have to go and cannot.
    """
    global _open_changes, _revision
    import torch  # noqa: F401  # with LPLN_PRECISION set, importing it makes a change of its own

    from lpln_autopatch import torch_compat

    patches = _patches()
    patches.prepare()
    drop, left = False, []
    with _lock:
        _open_changes += 1
        _revision += 1
        try:
            yield
            seen = None
            while _open_changes == 1 and seen != _revision:
                seen = _revision
                drop |= _set_active()
                if _base is None and not _blocks and not _keep_wrappers:
                    left = patches.remove()
        finally:
            _open_changes -= 1
    if drop:
        torch_compat.drop_compiled_code_that_cannot_follow()
    # Last of all, for those who make errors of warnings.
    for message in left if warn else ():
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _set_active() -> bool:
    """Make the hot path follow what is recorded, and say whether that has changed it."""
    from lpln_autopatch import forward

    request = current()
    engages = request is not None and request.precision.ever_engages
    lowering = request.lowering if request is not None and engages else None
    changed = lowering != forward.active
    forward.active = lowering
    return changed
