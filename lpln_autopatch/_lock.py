"""The lock of every change to PyTorch and to the active request."""

from __future__ import annotations

import os
import threading

# Nothing is imported, compiled or told to the user while it is held. Reentrant, because the garbage
# collector may close a scope in the middle of a change.
lock = threading.RLock()


def _renew() -> None:
    global lock
    lock = threading.RLock()


# A child that is forked while another thread holds the lock would wait for that thread forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
