"""The ways of activation without code: which are open here, and why the others are not.

importlib-metadata is imported by what needs it: the doctor is asked where something is missing.
"""

from __future__ import annotations

import dataclasses
import os
import sys


@dataclasses.dataclass(frozen=True)
class Finding:
    """Whether something can be used here.

    Attributes:
        usable: Whether it can.
        detail: Why not, or what it is.
    """

    usable: bool
    detail: str = ""

    def __str__(self) -> str:
        return f"{'yes' if self.usable else 'no'}{self.detail and f': {self.detail}'}"


def installed_version(name: str) -> str | None:
    """The version of the distribution `name`, or None where it is not installed."""
    import importlib_metadata

    try:
        return importlib_metadata.version(name)
    except importlib_metadata.PackageNotFoundError:
        return None


def _has_entry_point(group: str, name: str) -> bool:
    import importlib_metadata

    return bool(importlib_metadata.entry_points(group=group, name=name))


def find_routes() -> dict[str, Finding]:
    """The ways of activation without code, and whether each is open."""
    return {
        "torch.backends": _closed(_why_no_entry_point()),
        "sitecustomize": _closed(_why_no_sitecustomize()),
        "autowrapt": _closed(_why_no_autowrapt()),
    }


def _closed(reason: str) -> Finding:
    return Finding(not reason, reason)


def _why_no_entry_point() -> str:
    from lpln_autopatch import torch_compat

    loads = torch_compat.loads_entry_points()
    if loads is None:
        return "torch before 2.5 loads no entry points"
    if not loads:
        return "TORCH_DEVICE_BACKEND_AUTOLOAD switches it off"
    if not _has_entry_point("torch.backends", "lpln_autopatch"):
        return "lpln_autopatch is not installed, only on the path"
    return ""


def _why_no_sitecustomize() -> str:
    module = sys.modules.get("sitecustomize")
    # By a name of it: the file may have been copied.
    if hasattr(module, "_activate_when_torch_is_imported"):
        return ""
    other = getattr(module, "__file__", None)
    found = f": {other} is the one that Python found" if other else ""
    return f"sitecustomize_example is not first on PYTHONPATH{found}"


def _why_no_autowrapt() -> str:
    if installed_version("autowrapt") is None:
        return "autowrapt is not installed: pip install autowrapt"
    named = os.environ.get("AUTOWRAPT_BOOTSTRAP", "").split(",")
    if "lpln_autopatch" not in (name.strip() for name in named):
        return "AUTOWRAPT_BOOTSTRAP does not name lpln_autopatch"
    if not _has_entry_point("lpln_autopatch", "torch"):
        return "lpln_autopatch is not installed, only on the path"
    return ""
