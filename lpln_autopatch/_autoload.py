"""Zero code: LPLN_PRECISION turns low precision on when torch has been imported.

Called by torch itself (entry point group `torch.backends`), by autowrapt (group
`lpln_autopatch`), and by `sitecustomize_example`, `lpln run`'s too. With the variable unset it
imports nothing.
"""

from __future__ import annotations

import os
from typing import Any

_VARIABLE = "LPLN_PRECISION"
_AS_IF_UNSET = ("", "0", "off", "no", "false")

acted: str | None = None
"""The route that has activated, for `python -m lpln_autopatch`."""
_warned = False


def asks(value: str) -> bool:
    """Return True if this value of LPLN_PRECISION asks for anything, valid or not."""
    return value.strip().lower() not in _AS_IF_UNSET


def is_set() -> bool:
    """Return True if LPLN_PRECISION is set, and asks for anything."""
    return asks(os.environ.get(_VARIABLE, ""))


def _warn_of_mistake() -> None:
    """Print what is wrong with our variables, once: not as a warning, which may be an error."""
    global _warned
    if _warned or not any(name.startswith("LPLN_") for name in os.environ):
        return
    import sys

    from lpln_autopatch._variables import mistake

    if sentence := mistake(asks):
        _warned = True
        print(f"lpln_autopatch: {sentence}", file=sys.stderr)


def on_torch_import(torch: object = None, route: str | None = None) -> None:
    """Enable what LPLN_PRECISION asks for. Calling it again, by another route, does nothing.

    Args:
        torch: The module, as post-import hooks pass it; torch itself does not.
        route: Who calls, if neither torch nor autowrapt.

    Raises:
        SystemExit: LPLN_PRECISION, LPLN_BACKEND or LPLN_NORMS is not valid, or something that is
            needed does not import or fails. Not the error itself, which torch would bury in advice
            of its own, and which an `except Exception` around an import would hide.
        ValueError, ImportError: The same in a thread, where Python ignores SystemExit.
    """
    global acted
    if acted:
        return
    _warn_of_mistake()
    if not is_set():
        return

    import sys
    import threading

    # One of ours may be importing torch right now. It is only half there: it is put aside, so that
    # a whole one is imported if it is needed, which then is what its importer gets, too.
    halves = {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith("lpln_autopatch.")
        # None bars an import, as tests that do without a module have it.
        and getattr(getattr(module, "__spec__", None), "_initializing", False)
    }
    for name in halves:
        del sys.modules[name]

    try:
        from lpln_autopatch._activation import enable_from

        names = None
        if os.environ.get("LPLN_EXEMPT"):
            from lpln_autopatch._exempt_by_name import ByName

            names = ByName(os.environ["LPLN_EXEMPT"])
            names.install()
        enable_from(os.environ[_VARIABLE], "auto", None, "environment")

        from lpln_autopatch import _summary

        _summary.install(asks(os.environ.get("LPLN_SUMMARY", "")), names)
    except Exception as error:
        reason = (str(error) or repr(error)).rstrip(".")
        message = f"{reason}. Unset {_VARIABLE} to leave LayerNorm as PyTorch has it."
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(f"lpln_autopatch: {message}") from None
        raise (ValueError if isinstance(error, ValueError) else ImportError)(message) from None
    finally:
        for name, module in halves.items():
            sys.modules.setdefault(name, module)
    acted = route or ("torch.backends" if torch is None else "autowrapt")


def lightning_callbacks() -> list[Any]:
    """Give Lightning's Trainers the callback that lowers `fit`, where nothing else has activated.

    Lightning calls it when a Trainer is made (its group `callbacks_factory`).

    Returns:
        The callback, if LPLN_PRECISION asks for it and no route has read it; or else nothing.

    Raises:
        ValueError, ImportError: a variable is not valid, or the backend cannot be used here.
    """
    if acted or not is_set():
        return []
    from lpln_autopatch.integrations.lightning import LowPrecisionLayerNorm

    return [LowPrecisionLayerNorm(os.environ[_VARIABLE])]
