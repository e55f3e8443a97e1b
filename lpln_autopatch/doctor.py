"""What `python -m lpln_autopatch` finds out: what is in force here, by which route, or why not."""

from __future__ import annotations

import dataclasses
import os
import platform
import warnings
from typing import TYPE_CHECKING

from lpln_autopatch import autoload
from lpln_autopatch.precision import Precision
from lpln_autopatch.routes import Finding, find_routes, installed_version

if TYPE_CHECKING:
    from lpln_autopatch.request import Request

VARIABLES = (
    "LPLN_PRECISION",
    "LPLN_BACKEND",
    "LPLN_NORMS",
    "LPLN_EXEMPT",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "AUTOWRAPT_BOOTSTRAP",
    "PYTHONPATH",
)

_MODULES = {"layer_norm": "LayerNorm", "group_norm": "GroupNorm", "rms_norm": "RMSNorm"}


@dataclasses.dataclass(frozen=True)
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
        in_force = ("precision", "backend", "norms", "source", "installed", "acted")
        values = {**vars(self), "norms": self.norms and ", ".join(self.norms)}
        sections: dict[str, dict[str, object]] = {
            "versions": dict(self.versions),
            "environment": dict(self.environment),
            "in force": {name: values[name] for name in in_force},
            "routes": dict(self.routes),
            "backends": dict(self.backends),
            "devices": dict.fromkeys(self.devices, ""),
        }
        lines = []
        for title, rows in sections.items():
            lines += [title] if rows else []
            for name, value in rows.items():
                lines.append(f"  {name:30} {'-' if value is None else value}".rstrip())
        return "\n".join([*lines, "", self.verdict])

    @property
    def verdict(self) -> str:
        """The outcome, in a line."""
        if self.problem is not None:
            return f"LPLN_PRECISION does not lower LayerNorm: {self.problem}"
        if self.precision is None:
            value = self.environment.get("LPLN_PRECISION")
            how = "is not set" if value is None else f"is {value!r}"
            return f"LPLN_PRECISION {how}: LayerNorm is as PyTorch has it."
        zero_code = self.source == "environment"
        by = f"the route {self.acted}" if zero_code else f"{self.source} in this process"
        norms = " and ".join(_MODULES[norm] for norm in self.norms or ())
        verb = "are" if " " in norms else "is"
        if not Precision(self.precision).ever_engages:
            return f"{norms} {verb} stock: precision {self.precision} never engages, by {by}."
        return f"{norms} {verb} lowered: precision {self.precision}, by {by}."


def diagnose() -> Diagnosis:
    """Import torch, as a program would, and look at what that has done."""
    common = Diagnosis(
        versions={"python": platform.python_version()},
        environment={name: os.environ.get(name) for name in VARIABLES},
    )
    try:
        versions = {name: installed_version(name) for name in ("lpln_autopatch", "torch", "wrapt")}
        common = dataclasses.replace(common, versions={**versions, **common.versions})
        return _look(common)
    except SystemExit as error:  # our own, at a wrong variable
        return dataclasses.replace(common, problem=str(error).removeprefix("lpln_autopatch: "))
    except Exception as error:
        problem = f"torch, or what lpln_autopatch needs, fails: {error!r}."
        return dataclasses.replace(common, problem=problem)


def _look(common: Diagnosis) -> Diagnosis:
    """`common`, with everything that takes torch."""
    import torch  # noqa: F401

    from lpln_autopatch import backends, state, status, torch_compat

    now, routes = status(), find_routes()
    return dataclasses.replace(
        common,
        precision=str(now.precision) if now.precision else None,
        **{name: getattr(now, name) for name in ("backend", "norms", "source", "installed")},
        acted=autoload.acted,
        routes=routes,
        backends={name: _backend(name) for name in ("auto", *backends.names())},
        devices=torch_compat.devices(),
        problem=_problem(state.current(), routes) if autoload.is_set() else None,
    )


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
