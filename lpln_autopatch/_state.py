"""The requests of the process: which are made, and which is active.

Functions import torch here, and the module does not, for the reason that _request.py gives.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lpln_autopatch import _lock

if TYPE_CHECKING:
    from lpln_autopatch._patch import Patches
    from lpln_autopatch._request import Request


# Process-wide, not thread-local: autograd recomputes checkpoints in threads of its own.
_base: Request | None = None
# The requests of the open scopes in the order of entry, each under its scope. None is a
# recomputation whose forward ran with nothing active.
_scopes: dict[Scope, Request | None] = {}
# True from a user's request until the base is cleared. Until then checkpointing remembers the
# request of each forward, also while no request is active.
_asked = False
recorders: Mapping[str, Callable[..., Any]] | None = None
"""The functions that run in the place of each norm while `report` records."""
_made: Patches | None = None  # by `_patches`


def _after_fork() -> None:
    # Another thread may have been in the middle of a change.
    if _made is not None:
        _follow(_made)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def current() -> Request | None:
    """Return the innermost open block's request, or `enable()`'s if no block is open."""
    with _lock.lock:
        try:
            return next(reversed(_scopes.values()), _base)
        except RuntimeError:  # the garbage collector closed a scope between two steps
            return current()


def set_base(request: Request | None) -> Request | None:
    """Make `request` active wherever no scope is open; return the base that it replaces.

    With None nothing but the open scopes is active. After the last one PyTorch is as it was.
    """
    before = _base
    _change(functools.partial(_record_base, request), request)
    return before


def _record_base(request: Request | None) -> None:
    global _base, _asked
    _base, _asked = request, request is not None


class Scope:
    """A stretch of the program in which a request is active: a user's block, or a recomputation.

    It lasts from `open` to `close`; a scope that is opened later goes before it. An interruption
    leaves no scope open: if `open` or `close` raises, the scope is closed.

    Args:
        request: None for nothing, whatever else is active.
        asked: True for a user's block, False for a recomputation.
    """

    def __init__(self, request: Request | None, asked: bool = True) -> None:
        self._request = request
        self._is_asked_for = asked

    def open(self) -> None:
        """Make the request active."""
        try:
            _change(self._record, self._request)
        except BaseException:
            self.close()
            raise

    def _record(self) -> None:
        global _asked
        # If `disable()` runs inside a block, the end of the last block ends the memory of
        # checkpointing, too: a block inside that one does not begin it again.
        if self._is_asked_for and not _scopes:
            _asked = True
        _scopes[self] = self._request

    def close(self) -> None:
        """Close the scope. Scopes may close in any order, and more than once."""
        try:
            _change(self._forget, warn=self._is_asked_for)
        except KeyboardInterrupt:  # it may have come before anything was recorded
            _change(self._forget)
            raise

    def _forget(self) -> None:
        _scopes.pop(self, None)
        if not _scopes:
            _scopes.clear()  # a dict keeps the places of removed keys, and walks over them

    def __enter__(self) -> None:
        self.open()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def reset() -> int:
    """Clear the base, and close all open scopes. Return how many there were."""
    scopes = list(_scopes)
    for scope in scopes:
        scope.close()
    set_base(None)
    return len(scopes)


def _request_of_this_thread() -> Request | None:
    from lpln_autopatch import _exemption

    return None if _exemption.is_inside_exempt_module() else current()


def _recomputation(request: Request | None) -> Scope:
    return Scope(request, asked=False)


@contextlib.contextmanager
def recording(calls: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Run `calls[norm]` in the place of each norm, whatever is active."""
    from lpln_autopatch._norms import FUNCTIONS

    def record(new: Mapping[str, Callable[..., Any]] | None) -> None:
        global recorders
        recorders = new

    patches, before = _patches(), recorders
    for norm in FUNCTIONS:
        # A function that cannot be found is not lowered.
        with _lock.lock, contextlib.suppress(RuntimeError):
            patches.prepare([norm])
    end = functools.partial(record, before)
    try:
        _change(functools.partial(record, calls))
        yield
    finally:
        try:
            _change(end)
        except KeyboardInterrupt:
            _change(end)
            raise


def is_installed() -> bool:
    """Return True if PyTorch's functions of norms run our code."""
    patches = _patches()
    with _lock.lock:
        return patches.are_installed()


def _patches() -> Patches:
    """Return the one `Patches` of the process."""
    global _made
    if _made is not None:
        return _made
    import torch  # noqa: F401  # with LPLN_PRECISION set, its import makes a change of its own

    from lpln_autopatch import _checkpointing, _dynamo
    from lpln_autopatch._patch import Patches

    made = Patches(_checkpointing.replacements(_request_of_this_thread, _recomputation))
    _dynamo.connect(_tell_dynamo, _renew)
    with _lock.lock:
        _made = _made or made
    return _made


def _tell_dynamo() -> None:
    if _made is None:
        return
    with _lock.lock:
        _made.tell_dynamo()
    if is_installed():
        _made.settle(stacklevel=2)


def _renew() -> None:
    with _lock.lock:
        if _made is not None:
            _made.renew()


def _change(record: Callable[[], Any], request: Request | None = None, warn: bool = True) -> None:
    """Record a change and make it active, also if an interruption comes.

    Every step that can fail comes before the recording: a refused request changes nothing.
    """
    patches = _patches()
    with _lock.lock:
        if request is not None and request.precision.ever_engages:
            patches.prepare(request.norms.split(","))
        try:
            record()
            changed, message = _follow(patches)
        except BaseException:
            _follow(patches)
            raise
    if changed and "torch._dynamo" in sys.modules:
        patches.settle(stacklevel=4)
    # Last of all: a warning may be an error.
    if changed and warn and message is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _follow(patches: Patches) -> tuple[bool, str | None]:
    """Make the recorded request active.

    The garbage collector may close a scope meanwhile. So this is repeated until the active request
    is the recorded one.
    """
    changed, message = False, None
    while True:
        recorded = request, carries, calls = current(), _asked or bool(_scopes), recorders
        result = patches.follow(request, carries, calls)
        changed, message = changed or result[0], message or result[1]
        if recorded == (current(), _asked or bool(_scopes), recorders):
            return changed, message
