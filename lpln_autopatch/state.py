"""Who asked for what, in which order, and which request is in force: the state of the process.

torch is imported by what needs it, not by this module, for the reason that request.py gives.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lpln_autopatch.patch import Patches
    from lpln_autopatch.request import Request


# Process-wide, not thread-local: autograd recomputes checkpoints in threads of its own.
_base: Request | None = None
# In the order of entry. None is a recomputation whose forward ran with nothing in force.
_blocks: dict[object, Request | None] = {}
# Whether the wrappers stay, inert, once nothing is in force: from the first request until the
# base is cleared. Entering and leaving blocks in a loop must not patch every time.
_keep_wrappers = False
_made: Patches | None = None  # What `_patches` gives.
_holds = 0  # How many need the wrappers on, whatever is in force: see `wrappers_held`.

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
    """Open a block: `request` is in force until `leave(token)`, or until another is entered."""
    global _keep_wrappers
    with _change():
        _install_for(request)
        # Not in an open block: if the base was cleared there, the wrappers go with the last one.
        if not _blocks:
            _keep_wrappers = True
        _blocks[token] = request


def leave(token: object, warn: bool = True) -> None:
    """Close the block that was entered with `token`, in whatever order."""
    with _change(warn):
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
        leave(token, warn=False)


@contextlib.contextmanager
def wrappers_held() -> Iterator[None]:
    """Have the wrappers of every norm on, inert or not. None is put on or taken off inside."""
    global _holds
    patches = _patches()
    with _change():
        were_on = patches.on()
        patches.install()
        _holds += 1
    try:
        yield
    finally:
        with _change(warn=False):
            _holds -= 1
            requests = filter(None, (_base, *_blocks.values()))
            lowered = (request.norms for request in requests if request.precision.ever_engages)
            patches.remove(were_on.union(*lowered))


def is_installed() -> bool:
    """Whether our wrappers are on the norms, active or inert."""
    patches = _patches()
    with _lock:
        return bool(patches.on())


def _patches() -> Patches:
    """What this package patches: one object, whichever thread asks first."""
    global _made
    from lpln_autopatch.patch import Patches

    with _lock:
        if _made is None:
            _made = Patches(_capture, functools.partial(_again, None))
        return _made


def _install_for(request: Request) -> None:
    """What can fail, before anything is recorded: a refused request changes nothing."""
    if request.precision.ever_engages:
        _patches().install(request.norms)


@contextlib.contextmanager
def _change(warn: bool = True) -> Iterator[None]:
    """Hold the lock while the state changes, then have the hot path and the wrappers follow.

    With `warn`, say so if the wrappers have to go and cannot.
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
                if _base is None and not _blocks and not _keep_wrappers and not _holds:
                    left = patches.remove()
        finally:
            _open_changes -= 1
    if drop:
        torch_compat.drop_compiled_code_that_cannot_follow()
    # Last of all, for those who make errors of warnings.
    for message in left if warn else ():
        warnings.warn(message, RuntimeWarning, stacklevel=5)


def _set_active() -> bool:
    """Make the hot path follow what is recorded, and say whether that has changed it."""
    from lpln_autopatch import forward
    from lpln_autopatch.dynamo import switch

    request = current()
    engages = request is not None and request.precision.ever_engages
    lowering = request.lowering if request is not None and engages else forward.INACTIVE
    if lowering == forward.active:
        return False
    with switch():
        forward.active = lowering
    return True
