"""Activate lpln_autopatch where torch does not load entry points (torch < 2.5, or
TORCH_DEVICE_BACKEND_AUTOLOAD=0):

    PYTHONPATH=sitecustomize_example LPLN_PRECISION=amp python train.py

Python imports this module when it starts. Nothing happens until the program imports torch; with
LPLN_PRECISION unset, nothing at all. A `sitecustomize` that this one shadows still runs.
`lpln run train.py` does all this by itself.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


class _RefuseTorch:
    """Stops a program that imports torch. What goes wrong in a sitecustomize Python only prints."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise SystemExit("LPLN_PRECISION is set, and wrapt cannot be imported: see above.")


def _on_torch_import(torch):
    # Here: lpln_autopatch is imported with torch, not in every Python that starts.
    try:
        from lpln_autopatch._autoload import on_torch_import
    except ImportError as error:
        raise SystemExit(f"LPLN_PRECISION is set, and {error}.") from None

    on_torch_import(torch, "sitecustomize")


def _activate_when_torch_is_imported():
    try:
        import wrapt

        wrapt.register_post_import_hook(_on_torch_import, "torch")
    except ImportError:
        sys.meta_path.insert(0, _RefuseTorch)
        raise


def _run_shadowed_sitecustomize():
    here = os.path.dirname(os.path.realpath(__file__))
    path = [os.path.realpath(entry) for entry in sys.path]
    # Behind the last entry that is this folder: by another name it may be there twice.
    behind = len(path) - path[::-1].index(here)
    spec = PathFinder.find_spec("sitecustomize", sys.path[behind:])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


try:
    if os.environ.get("LPLN_PRECISION", "").strip().lower() not in ("", "0", "off", "no", "false"):
        _activate_when_torch_is_imported()
finally:
    _run_shadowed_sitecustomize()
