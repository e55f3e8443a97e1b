"""Activate lpln_autopatch where torch does not load entry points (torch < 2.5, or
TORCH_DEVICE_BACKEND_AUTOLOAD=0):

    PYTHONPATH=sitecustomize_example LPLN_PRECISION=amp python train.py

Python imports this module when it starts. Nothing happens until the program imports torch; with
LPLN_PRECISION unset, nothing at all. A `sitecustomize` that this one shadows still runs.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def _activate_when_torch_is_imported():
    try:
        import wrapt

        # By name: lpln_autopatch is imported with torch, not in every Python that starts here.
        wrapt.register_post_import_hook("lpln_autopatch.autoload:on_torch_import", "torch")
    except ImportError:
        # Python prints what goes wrong in a sitecustomize and goes on. A program that uses torch
        # must not go on without what LPLN_PRECISION asks for.
        sys.modules["torch"] = None
        raise


def _run_shadowed_sitecustomize():
    here = os.path.dirname(os.path.realpath(__file__))
    path = [os.path.realpath(entry) for entry in sys.path]
    spec = PathFinder.find_spec("sitecustomize", sys.path[path.index(here) + 1 :])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


try:
    if os.environ.get("LPLN_PRECISION"):
        _activate_when_torch_is_imported()
finally:
    _run_shadowed_sitecustomize()
