"""Zero code: activate the precision of LPLN_PRECISION when torch has been imported.

Three routes call `on_torch_import`: torch itself (entry point group `torch.backends`), autowrapt
(group `lpln_autopatch`), and `sitecustomize_example`, which `lpln run` uses too. With the variable
unset it imports nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_VARIABLE = "LPLN_PRECISION"
_AS_IF_UNSET = ("", "0", "off", "no", "false")

acted: str | None = None
"""The route that has activated, or None."""
_warned = False


def asks(value: str) -> bool:
    """Return True if a variable of this value is meant to have an effect, valid or not."""
    return value.strip().lower() not in _AS_IF_UNSET


def is_set() -> bool:
    """Return True if LPLN_PRECISION is set, and not to a word for "off"."""
    return asks(os.environ.get(_VARIABLE, ""))


def _warn_of_mistake() -> None:
    """Print, once, which variable is misspelt or lacks LPLN_PRECISION.

    It is no Python warning, because a program may turn warnings into errors.
    """
    global _warned
    if _warned or not any(name.startswith("LPLN_") for name in os.environ):
        return
    from lpln_autopatch._variables import mistake

    if sentence := mistake(asks):
        _warned = True
        print(f"lpln_autopatch: {sentence}", file=sys.stderr)


def on_torch_import(torch: object = None, route: str | None = None) -> None:
    """Enable the precision of LPLN_PRECISION. A second call, by another route, does nothing.

    Args:
        torch: The module, as post-import hooks pass it; torch itself passes none.
        route: The name of the caller, if it is neither torch nor autowrapt.

    Raises:
        SystemExit: LPLN_PRECISION, LPLN_BACKEND or LPLN_NORMS is not valid, or an import fails. It
            is no ValueError or ImportError: torch would surround that with advice of its own, and a
            program's `except Exception` around an import would hide it.
        ValueError, ImportError: The same in a thread, where Python ignores SystemExit.
    """
    global acted
    if acted:
        return
    _warn_of_mistake()
    if not is_set():
        return

    import threading

    try:
        with _half_imported_modules_aside():
            _activate()
    except Exception as error:
        reason = (str(error) or repr(error)).rstrip(".")
        message = f"{reason}. Unset {_VARIABLE} to leave LayerNorm as PyTorch has it."
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(f"lpln_autopatch: {message}") from None
        raise (ValueError if isinstance(error, ValueError) else ImportError)(message) from None
    acted = route or ("torch.backends" if torch is None else "autowrapt")


def _activate() -> None:
    """Enable what the variables ask for. If it fails, nothing is left behind."""
    from lpln_autopatch._activation import enable_from

    with contextlib.ExitStack() as undo:
        names = None
        if os.environ.get("LPLN_EXEMPT"):
            from lpln_autopatch._exempt_by_name import ByName

            names = ByName(os.environ["LPLN_EXEMPT"])
            undo.push(names.install())
        enable_from(os.environ[_VARIABLE], "auto", None, "environment")

        from lpln_autopatch import _summary

        _summary.install(asks(os.environ.get("LPLN_SUMMARY", "")), names)
        undo.pop_all()


@contextlib.contextmanager
def _half_imported_modules_aside() -> Iterator[None]:
    """Have our modules whose import is under way imported anew.

    `import lpln_autopatch.surgery` may be the import that imports torch, and call us by it. That
    module is half initialised then, and ours would find it so.
    """
    halves = {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith("lpln_autopatch.")
        # A None in sys.modules bars an import.
        and getattr(getattr(module, "__spec__", None), "_initializing", False)
    }
    for name in halves:
        del sys.modules[name]
    try:
        yield
    finally:
        # The importer of a half gets the new module, too, if there is one.
        for name, module in halves.items():
            sys.modules.setdefault(name, module)


def lightning_callbacks() -> list[Any]:
    """Return the callback that lowers `fit`, for each of Lightning's Trainers.

    Lightning calls it when a Trainer is made (entry point group `callbacks_factory`).

    Returns:
        The callback in a list, if LPLN_PRECISION is set and no route has read it; or else [].

    Raises:
        ValueError: a variable is not valid.
        ImportError: the backend cannot be used here.
    """
    if acted or not is_set():
        return []
    from lpln_autopatch.integrations.lightning import LowPrecisionLayerNorm

    return [LowPrecisionLayerNorm(os.environ[_VARIABLE])]
