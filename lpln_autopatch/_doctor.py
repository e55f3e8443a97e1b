"""The doctor, `python -m lpln_autopatch`: the active request, its route, or why there is none.

Functions import importlib-metadata themselves: the doctor also runs where that is missing.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lpln_autopatch import _autoload, _variables
from lpln_autopatch._precision import Precision

VARIABLES = (
    *_variables.NAMES,
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "AUTOWRAPT_BOOTSTRAP",
    "PYTHONPATH",
)
_ACTIVE = ("precision", "backend", "norms", "source", "installed", "acted")
_MODULES = {
    "layer_norm": "LayerNorm",
    "group_norm": "GroupNorm",
    "rms_norm": "RMSNorm",
    "hand_written": "hand-written norms",
}


def diagnose() -> dict[str, Any]:
    """Import torch, as a program would, and find out which request that has made active.

    Returns:
        The object that `--json` writes. versions; environment: the variables that matter, None
        where unset; precision, backend, norms, source and installed: as in `Status`; acted: the
        route that activated, or None; routes and backends: for each "usable", and as "detail" the
        obstacle or the backend that runs; devices; advice: a list of sentences; problem: why
        LPLN_PRECISION lowers nothing, or an error, or None.
    """
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version()},
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        **dict.fromkeys((*_ACTIVE, "problem")),
        "installed": False,
        "routes": {},
        "backends": {},
        "devices": [],
        "advice": _advice(),
    }
    try:
        names = ("lpln_autopatch", "torch", "wrapt")
        found["versions"] = {n: _installed_version(n) for n in names} | found["versions"]

        import torch  # noqa: F401

        from lpln_autopatch import _torch_compat, backends, status

        now = {**vars(status()), "acted": _autoload.acted}
        found |= {name: now[name] for name in ("versions", *_ACTIVE)}
        found["routes"] = _routes()
        found["devices"] = _torch_compat.devices()
        found["backends"] = {name: _backend(name) for name in ("auto", *backends.names())}
        if _autoload.is_set():
            found["problem"] = _problem(found)
    except SystemExit as error:  # zero code refuses a wrong variable so
        found["problem"] = str(error).removeprefix("lpln_autopatch: ")
    except Exception as error:
        found["problem"] = f"torch, or what lpln_autopatch needs, fails: {error!r}."
    return found


def text(found: dict[str, Any]) -> str:
    """Return the findings of `diagnose` for people: sections, and the outcome in the last line."""
    norms = found["norms"] and ", ".join(found["norms"])
    sections: dict[str, dict[str, Any]] = {
        **found,
        "active": {name: found[name] for name in _ACTIVE} | {"norms": norms},
        "devices": dict.fromkeys(found["devices"], ""),
    }
    lines = []
    for title in ("versions", "environment", "active", "routes", "backends", "devices"):
        lines += [title] if sections[title] else []
        for name, value in sections[title].items():
            if isinstance(value, dict):
                word = "yes" if value["usable"] else "no"
                value = f"{word}: {value['detail']}" if value["detail"] else word
            lines.append(f"  {name:30} {'-' if value is None else value}".rstrip())
    return "\n".join([*lines, "", *found["advice"], _verdict(found)])


def _verdict(found: dict[str, Any]) -> str:
    value, precision = found["environment"]["LPLN_PRECISION"], found["precision"]
    if found["problem"] is not None:
        outcome = "LPLN_PRECISION does not lower LayerNorm: " if value else ""
        return f"{outcome}{found['problem']}"
    if precision is None:
        how = "is not set" if value is None else f"is {value!r}"
        return f"LPLN_PRECISION {how}: LayerNorm is as PyTorch has it."
    names = [_MODULES[norm] for norm in found["norms"]]
    norms = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    verb = "is" if len(names) == 1 and found["norms"] != ("hand_written",) else "are"
    by = f"{found['source']} in this process"
    if found["source"] == "environment":
        by = f"the route {found['acted']}"
    outcome, never = ("lowered", "") if precision.ever_engages else ("stock", " never engages")
    return f"{norms} {verb} {outcome}: precision {precision}{never}, by {by}."


def _advice() -> list[str]:
    """Return advice about variables that have no effect, or that cannot be checked here."""
    advice = [_variables.mistake(_autoload.asks)]
    if os.environ.get("LPLN_EXEMPT"):
        advice.append(
            "LPLN_EXEMPT is matched when a program makes its modules: LPLN_SUMMARY=1 lists at exit "
            "the names that matched none."
        )
    return [sentence for sentence in advice if sentence]


def _finding(usable: bool, detail: str = "") -> dict[str, Any]:
    return {"usable": usable, "detail": detail}


def _installed_version(name: str) -> str | None:
    """Return the version of the distribution `name`, or None if it is not installed."""
    import importlib_metadata

    return next((found.version for found in importlib_metadata.distributions(name=name)), None)


def _routes() -> dict[str, Any]:
    """Return the findings about each route of activation without code."""
    closed = {
        "torch.backends": _why_no_entry_point(),
        "sitecustomize": _why_no_sitecustomize(),
        "autowrapt": _why_no_autowrapt(),
    }
    return {route: _finding(not why, why) for route, why in closed.items()}


def _why_no_entry_point() -> str:
    from lpln_autopatch import _torch_compat

    loads = _torch_compat.loads_entry_points()
    if loads is None:
        return "torch before 2.5 loads no entry points"
    if not loads:
        return "TORCH_DEVICE_BACKEND_AUTOLOAD switches it off"
    return _why_not_installed("torch.backends", "lpln_autopatch")


def _why_no_sitecustomize() -> str:
    module = sys.modules.get("sitecustomize")
    # By a name in the file, and not by its path: users copy the file.
    if hasattr(module, "_activate_when_torch_is_imported"):
        return ""
    other = getattr(module, "__file__", None)
    found = f": Python found {other}" if other else ""
    return f"sitecustomize_example is not first on PYTHONPATH, nor is lpln run's{found}"


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


def _backend(name: str) -> dict[str, Any]:
    """Load the backend `name`, and return the finding."""
    from lpln_autopatch import backends

    try:
        chosen, _ = backends.resolve(name, Precision.AMP)
    except (Exception, SystemExit) as error:
        return _finding(False, repr(error) if isinstance(error, SystemExit) else str(error))
    if name in ("fused", "lean"):
        why = backends.fused.why_native()
        return _finding(not why, why)
    return _finding(True, chosen if chosen != name else "")


def _problem(found: dict[str, Any]) -> str | None:
    """Return why LPLN_PRECISION, which is set, does not lower LayerNorm, or None if it does."""
    try:
        Precision.parse(os.environ["LPLN_PRECISION"], "LPLN_PRECISION")
    except ValueError as error:
        return str(error)
    if found["acted"] is None:
        closed = "; ".join(
            f"{name}: {route['detail'] or 'open, and did not act'}"
            for name, route in found["routes"].items()
        )
        source = found["source"]
        other = f" The active request comes from {source} in this process." if source else ""
        return f"no route has read it ({closed}).{other}"
    if found["precision"] is None:
        return "disable in this process has undone it."
    if not found["precision"].ever_engages:
        return f"precision {str(found['precision'])!r} never engages."
    return _why_stock(found["precision"], found["norms"])


def _why_stock(precision: Precision, norms: Sequence[str]) -> str | None:
    """Run each norm on the CPU, as a patcher may hide ours; return why one is stock, or None."""
    import torch

    from lpln_autopatch._torch_compat import autocast_dtype

    dtype = torch.bfloat16 if precision.engages(torch.bfloat16) else torch.float16
    for norm in norms:
        if norm == "hand_written":  # torch.nn has no such module
            continue
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
