"""The requests of the process, and which one is active.

torch is imported by what needs it, not by this module, for the reason that _request.py gives.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpln_autopatch._patch import Patches
    from lpln_autopatch._request import Request


# Process-wide, not thread-local: autograd recomputes checkpoints in threads of its own.
_base: Request | None = None
# In the order of entry, each under an object of its own. None is a recomputation whose forward ran
# with nothing active.
_blocks: dict[object, Request | None] = {}
# Whether somebody has asked for anything since the base was last cleared. Until then checkpointing
# remembers what its forwards ran under, also while nothing is active.
_asked = False
recorder: Mapping[str, Callable[..., Any]] | None = None
"""What runs in the place of each norm while `report` records."""
_made: Patches | None = None  # What `_patches` gives.

# Nothing is imported, compiled or told to the user while it is held. Reentrant, because the garbage
# collector may close a block in the middle of a change.
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    if _made is not None:
        _follow(_made)


# A child forked while another thread holds the lock would wait for that thread forever, and have
# half of what that one was changing.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def current() -> Request | None:
    """Return the innermost open block's request, or `enable()`'s if no block is open."""
    with _lock:
        try:
            return next(reversed(_blocks.values()), _base)
        except RuntimeError:  # the garbage collector has closed a block between two steps of this
            return current()


def set_base(request: Request | None) -> Request | None:
    """Make `request` active wherever no block is open; return the one that it takes the place of.

    None leaves nothing active but the open blocks, and nothing changed in PyTorch after the last.
    """
    before = _base
    _change(functools.partial(_record_base, request), request)
    return before


def _record_base(request: Request | None) -> None:
    global _base, _asked
    _base, _asked = request, request is not None


class Block:
    """A request that is active between `open` and `close`, or until another block is opened.

    An interruption leaves no block open: if `open` or `close` raises, the block is closed.

    Args:
        request: None for nothing, whatever else is active.
        asked: Whether it is somebody's request, and no recomputation's.
    """

    def __init__(self, request: Request | None, asked: bool = True) -> None:
        self._request = request
        self._is_asked_for = asked
        self._key = object()

    def open(self) -> None:
        """Make the request active."""
        try:
            _change(self._record, self._request)
        except BaseException:
            self.close()
            raise

    def _record(self) -> None:
        global _asked
        # Not in an open block: if the base was cleared there, all goes with the last one.
        if self._is_asked_for and not _blocks:
            _asked = True
        _blocks[self._key] = self._request

    def close(self) -> None:
        """Close the block. Blocks may close in any order, and more than once."""
        try:
            _change(self._forget, warn=self._is_asked_for)
        except KeyboardInterrupt:  # it may have come before anything was recorded
            _change(self._forget)
            raise

    def _forget(self) -> None:
        _blocks.pop(self._key, None)
        if not _blocks:
            _blocks.clear()  # a dict keeps the places of what was taken out, and looks through them

    def __enter__(self) -> None:
        self.open()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _capture() -> Callable[[], Block]:
    """Return a maker of blocks for recomputations: of the request that is active in this thread."""
    from lpln_autopatch import _exemption

    request = None if _exemption.is_exempt_now() else current()
    return functools.partial(Block, request, asked=False)


@contextlib.contextmanager
def recording(calls: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Run `calls[norm]` in the place of each norm, whatever is active."""
    from lpln_autopatch._norms import NAMES

    def record(new: Mapping[str, Callable[..., Any]] | None) -> None:
        global recorder
        recorder = new

    patches, before = _patches(), recorder
    for norm in NAMES:
        # One that cannot be found is nothing that is lowered.
        with _lock, contextlib.suppress(RuntimeError):
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
    with _lock:
        return bool(patches.exchanged())


def _patches() -> Patches:
    """Return the one `Patches` of the process."""
    global _made
    if _made is not None:
        return _made
    import torch  # noqa: F401  # with LPLN_PRECISION set, importing it makes a change of its own

    from lpln_autopatch import _checkpointing, _dynamo
    from lpln_autopatch._patch import Patches

    stock = functools.partial(Block, None, asked=False)
    made = Patches(_checkpointing.replacements(_capture, stock))
    _dynamo.connect(_tell_dynamo, _renew)
    with _lock:
        _made = _made or made
    return _made


def _tell_dynamo() -> None:
    if _made is None:
        return
    with _lock:
        _made.tell_dynamo()
    if is_installed():
        _made.settle(stacklevel=2)


def _renew() -> None:
    with _lock:
        if _made is not None:
            _made.renew()


def _change(record: Callable[[], Any], request: Request | None = None, warn: bool = True) -> None:
    """Record a change and make it active, also if an interruption comes.

    What can fail comes before anything is recorded: a refused request changes nothing.
    """
    patches = _patches()
    with _lock:
        if request is not None and request.precision.ever_engages:
            patches.prepare(request.norms)
        try:
            record()
            changed, message = _follow(patches)
        except BaseException:
            _follow(patches)
            raise
    if changed and "torch._dynamo" in sys.modules:
        patches.settle(stacklevel=4)
    # Last of all, for those who make errors of warnings.
    if changed and warn and message is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _follow(patches: Patches) -> tuple[bool, str | None]:
    """Make active what is recorded.

    The garbage collector may close a block meanwhile: again, until what is active is what is
    recorded.
    """
    changed, message = False, None
    while True:
        recorded = request, carries, calls = current(), _asked or bool(_blocks), recorder
        result = patches.follow(request, carries, calls)
        changed, message = changed or result[0], message or result[1]
        if recorded == (current(), _asked or bool(_blocks), recorder):
            return changed, message
