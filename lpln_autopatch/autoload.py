"""Zero code: LPLN_PRECISION turns low precision on when torch has been imported.

Called by torch itself (entry point group `torch.backends`), by autowrapt (group
`lpln_autopatch`), and by `sitecustomize_example`. With the variable unset it imports nothing.
"""

from __future__ import annotations

import os

_VARIABLE = "LPLN_PRECISION"
_AS_IF_UNSET = ("", "0", "off")

acted: str | None = None
"""The route that has activated, for `python -m lpln_autopatch`."""


def is_set() -> bool:
    """Whether LPLN_PRECISION asks for anything, valid or not."""
    return os.environ.get(_VARIABLE, "").strip().lower() not in _AS_IF_UNSET


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
    if acted or not is_set():
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
        from lpln_autopatch.activation import enable_from

        if os.environ.get("LPLN_EXEMPT"):
            from lpln_autopatch.exemption import ByName

            ByName(os.environ["LPLN_EXEMPT"]).install()
        enable_from(os.environ[_VARIABLE], "auto", None, "environment")
        if os.environ.get("LPLN_SUMMARY", "").strip().lower() not in _AS_IF_UNSET:
            from lpln_autopatch import summary

            summary.install()
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
