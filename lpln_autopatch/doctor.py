"""What `python -m lpln_autopatch` finds out: what is in force here, by which route, or why not.

importlib-metadata is imported by what needs it: the doctor is asked where something is missing.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import warnings
from typing import TYPE_CHECKING

from lpln_autopatch import autoload
from lpln_autopatch.precision import Precision

if TYPE_CHECKING:
    from lpln_autopatch.request import Request

VARIABLES = (
    *(f"LPLN_{name}" for name in ("PRECISION", "BACKEND", "NORMS", "EXEMPT", "SUMMARY")),
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "AUTOWRAPT_BOOTSTRAP",
    "PYTHONPATH",
)

_MODULES = {"layer_norm": "LayerNorm", "group_norm": "GroupNorm", "rms_norm": "RMSNorm"}


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


@dataclasses.dataclass
class Diagnosis:
    """The state of this process after `import torch`, as a program that starts like it has it.

    Attributes:
        versions: Of lpln_autopatch, torch, wrapt and python.
        environment: The variables that matter, None where unset.
        precision: The precision in force, or None.
        backend: What normalises, or None.
        norms: The names of the norms that are lowered, or None.
        source: "environment", or None; "enable" or "block" if a sitecustomize has called that.
        installed: Whether our wrappers are on.
        acted: The route that activated, or None.
        routes: The ways of activation without code, and whether each is open.
        backends: Every backend that can be named, and whether it can be used.
        devices: The devices that torch sees.
        problem: Why LPLN_PRECISION, which is set, lowers nothing, or what fails; or None.
    """

    versions: dict[str, str | None]
    environment: dict[str, str | None]
    precision: str | None = None
    backend: str | None = None
    norms: tuple[str, ...] | None = None
    source: str | None = None
    installed: bool = False
    acted: str | None = None
    routes: dict[str, Finding] = dataclasses.field(default_factory=dict)
    backends: dict[str, Finding] = dataclasses.field(default_factory=dict)
    devices: list[str] = dataclasses.field(default_factory=list)
    problem: str | None = None

    def __str__(self) -> str:
        values = {**vars(self), "norms": self.norms and ", ".join(self.norms)}
        in_force = ("precision", "backend", "norms", "source", "installed", "acted")
        lines = []
        for title, rows in (
            ("versions", self.versions),
            ("environment", self.environment),
            ("in force", {name: values[name] for name in in_force}),
            ("routes", self.routes),
            ("backends", self.backends),
            ("devices", dict.fromkeys(self.devices, "")),
        ):
            lines += [title] if rows else []
            for name, value in rows.items():
                lines.append(f"  {name:30} {'-' if value is None else value}".rstrip())
        return "\n".join([*lines, "", self.verdict])

    @property
    def verdict(self) -> str:
        """The outcome, in a line."""
        if self.problem is not None:
            is_set = bool(self.environment["LPLN_PRECISION"])
            return "LPLN_PRECISION does not lower LayerNorm: " * is_set + self.problem
        if self.precision is None:
            value = self.environment["LPLN_PRECISION"]
            how = "is not set" if value is None else f"is {value!r}"
            return f"LPLN_PRECISION {how}: LayerNorm is as PyTorch has it."
        norms = " and ".join(_MODULES[norm] for norm in self.norms or ())
        verb = "are" if " " in norms else "is"
        zero_code = self.source == "environment"
        by = f"the route {self.acted}" if zero_code else f"{self.source} in this process"
        engages = Precision(self.precision).ever_engages
        outcome, never = ("lowered", "") if engages else ("stock", " never engages")
        return f"{norms} {verb} {outcome}: precision {self.precision}{never}, by {by}."


def diagnose() -> Diagnosis:
    """Import torch, as a program would, and look at what that has done."""
    found = Diagnosis(
        versions={"python": platform.python_version()},
        environment={name: os.environ.get(name) for name in VARIABLES},
    )
    try:
        names = ("lpln_autopatch", "torch", "wrapt")
        found.versions = {name: _installed_version(name) for name in names} | found.versions

        import torch  # noqa: F401

        from lpln_autopatch import backends, state, status, torch_compat

        now = status()
        found.precision = str(now.precision) if now.precision else None
        found.backend, found.norms, found.source = now.backend, now.norms, now.source
        found.installed, found.acted = now.installed, autoload.acted
        closed = {
            "torch.backends": _why_no_entry_point(),
            "sitecustomize": _why_no_sitecustomize(),
            "autowrapt": _why_no_autowrapt(),
        }
        found.routes = {route: Finding(not why, why) for route, why in closed.items()}
        found.backends = {name: _backend(name) for name in ("auto", *backends.names())}
        found.devices = torch_compat.devices()
        if autoload.is_set():
            found.problem = _problem(state.current(), found.routes)
    except SystemExit as error:  # our own, at a wrong variable
        found.problem = str(error).removeprefix("lpln_autopatch: ")
    except Exception as error:
        found.problem = f"torch, or what lpln_autopatch needs, fails: {error!r}."
    return found


def _installed_version(name: str) -> str | None:
    """The version of the distribution `name`, or None where it is not installed."""
    import importlib_metadata

    return next((found.version for found in importlib_metadata.distributions(name=name)), None)


def _why_no_entry_point() -> str:
    from lpln_autopatch import torch_compat

    loads = torch_compat.loads_entry_points()
    if loads is None:
        return "torch before 2.5 loads no entry points"
    if not loads:
        return "TORCH_DEVICE_BACKEND_AUTOLOAD switches it off"
    return _why_not_installed("torch.backends", "lpln_autopatch")


def _why_no_sitecustomize() -> str:
    module = sys.modules.get("sitecustomize")
    # By a name of it: the file may have been copied.
    if hasattr(module, "_activate_when_torch_is_imported"):
        return ""
    other = getattr(module, "__file__", None)
    found = f": {other} is the one that Python found" if other else ""
    return f"sitecustomize_example is not first on PYTHONPATH{found}"


def _why_no_autowrapt() -> str:
    if _installed_version("autowrapt") is None:
        return "autowrapt is not installed: pip install autowrapt"
    named = os.environ.get("AUTOWRAPT_BOOTSTRAP", "").split(",")
    if "lpln_autopatch" not in (name.strip() for name in named):
        return "AUTOWRAPT_BOOTSTRAP does not name lpln_autopatch"
    return _why_not_installed("lpln_autopatch", "torch")


def _why_not_installed(group: str, name: str) -> str:
    import importlib_metadata

    there = importlib_metadata.entry_points(group=group, name=name)
    return "" if there else "lpln_autopatch is not installed, only on the path"


def _backend(name: str) -> Finding:
    """Whether `name` can be used, by loading it."""
    from lpln_autopatch import backends

    try:
        chosen, _ = backends.resolve(name, Precision.AMP)
    except Exception as error:
        return Finding(False, str(error))
    except SystemExit as error:
        return Finding(False, repr(error))
    return Finding(True, chosen if chosen != name else "")


def _problem(request: Request | None, routes: dict[str, Finding]) -> str | None:
    """Why LPLN_PRECISION, which is set, does not lower LayerNorm, or None if it does."""
    try:
        Precision.parse(os.environ["LPLN_PRECISION"], "LPLN_PRECISION")
    except ValueError as error:
        return str(error)
    if autoload.acted is None:
        closed = "; ".join(
            f"{name}: {found.detail or 'open, and did not act'}" for name, found in routes.items()
        )
        other = f" What is in force comes from {request.source} in this process." if request else ""
        return f"no route has read it ({closed}).{other}"
    if request is None:
        return "disable in this process has undone it."
    if not request.precision.ever_engages:
        return f"precision {str(request.precision)!r} never engages."
    return _why_stock(request)


def _why_stock(request: Request) -> str | None:
    """By running each norm on the CPU: what is in force may still be hidden by a patcher."""
    import torch

    from lpln_autopatch.torch_compat import autocast_dtype

    dtype = request.lowering.dtypes[-1]
    for norm in request.norms:
        name = _MODULES[norm]
        module = getattr(torch.nn, name)(*([2] if norm == "group_norm" else []), 8)
        with warnings.catch_warnings(), torch.autocast("cpu", dtype=dtype):
            warnings.simplefilter("ignore")
            if autocast_dtype("cpu") is not dtype:  # until torch 2.4: no float16 there
                return None
            try:
                gives = module(torch.zeros(1, 8)).dtype
            except Exception as error:
                return f"a {name} on the CPU fails: {error!r}."
        if gives is not dtype:
            runs = f"{type(module).forward!r} and {getattr(torch.nn.functional, norm)!r}"
            return f"a {name} under autocast to {dtype} gives {gives}: its forward is {runs}."
    return None
