"""Activate lpln_autopatch also where torch loads no entry points.

That is the case before torch 2.5, and with TORCH_DEVICE_BACKEND_AUTOLOAD=0:

    PYTHONPATH=sitecustomize_example LPLN_PRECISION=amp python train.py

Python imports this module when it starts. It acts when the program imports torch, and with
LPLN_PRECISION unset it does nothing. A `sitecustomize` that this module shadows still runs.
`lpln run train.py` sets all of this by itself.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


class _RefuseTorch:
    """Stops a program that imports torch: Python only prints the errors of a sitecustomize."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise SystemExit("LPLN_PRECISION is set, and wrapt cannot be imported: see above.")


def _on_torch_import(torch):
    # Imported only here, and not in every Python that starts.
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
    # Search behind the last entry of this folder, which may be on the path by several names.
    behind = len(path) - path[::-1].index(here)
    spec = PathFinder.find_spec("sitecustomize", sys.path[behind:])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


try:
    if os.environ.get("LPLN_PRECISION", "").strip().lower() not in ("", "0", "off", "no", "false"):
        _activate_when_torch_is_imported()
finally:
    _run_shadowed_sitecustomize()
