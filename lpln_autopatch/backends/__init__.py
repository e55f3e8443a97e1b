"""The backends, which normalise lowered calls, and the choice of one by its name."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from importlib_metadata import EntryPoint, entry_points

from lpln_autopatch import _torch_compat
from lpln_autopatch._exemption import run_stock
from lpln_autopatch._precision import Precision
from lpln_autopatch.backends import apex, fused, native
from lpln_autopatch.backends.protocol import Backend as Backend

GROUP = "lpln_autopatch.backends"
"""The entry point group of backends that other distributions bring. Each names a `Backend`."""

_BUILT_IN: dict[str, Callable[[], Backend]] = {
    "native": lambda: native.normalise,
    "fused": lambda: fused.load(fused.fused),
    "lean": lambda: fused.load(fused.lean),
    "apex": apex.load,
    "apex_lean": apex.load_lean,
}


def resolve(name: str, precision: Precision) -> tuple[str, Backend]:
    """Return the backend that `name` chooses for `precision`: its own name, and its function.

    `name`, and what is raised, are those of the argument `backend` of `enable`.
    """
    argument = "backend"
    if name == "auto":
        name, argument = os.environ.get("LPLN_BACKEND") or "auto", "LPLN_BACKEND"
    if name == "auto":
        name = automatic(precision)
    if name in _BUILT_IN:
        try:
            return name, _BUILT_IN[name]()
        except ImportError as error:
            raise ImportError(f"{argument}={name!r}: {error}") from error
    for entry_point in entry_points(group=GROUP, name=name):
        where = f"{argument}={name!r}: the backend {entry_point.value}"
        if not _is_being_imported(entry_point.module):
            _load(entry_point, where)
        return name, _OfAnotherPackage(entry_point, where)
    raise ValueError(f"{argument}={name!r} is not a backend. Valid: auto, {', '.join(names())}.")


# Cached for each `where`, too: an error names the argument or variable that chose the backend, also
# if it is raised at the first call.
@functools.cache
def _load(entry_point: EntryPoint, where: str) -> Backend:
    try:
        backend: Backend = entry_point.load()
    except Exception as error:
        raise ImportError(
            f"{where} does not load: {error!r}. Repair or uninstall it, or name another one."
        ) from error
    if not callable(backend):
        raise ImportError(f"{where} is {backend!r}, not a function. Name another one.")
    return backend


@dataclasses.dataclass(frozen=True)  # a request that is made again is equal to the first
class _OfAnotherPackage:
    """A backend that is loaded when it is called, if not before. The norms it calls are stock."""

    entry_point: EntryPoint
    where: str

    def __call__(self, *call: Any, **named: Any) -> torch.Tensor:
        backend = _load(self.entry_point, self.where)
        y: torch.Tensor = run_stock("inside a backend", backend, *call, **named)
        return y

    def rms_norm(self, *call: Any) -> torch.Tensor:
        """Run the backend's own, or else native's."""
        theirs = getattr(_load(self.entry_point, self.where), "rms_norm", None)
        y: torch.Tensor
        if theirs is None:
            y = native.rms_norm(*call)
        else:
            y = run_stock("inside a backend", theirs, *call)
        return y


def _is_being_imported(module: str) -> bool:
    """Return True if the import of `module`, or of a package around it, has not ended.

    Its first line may import torch, which activates this package, and LPLN_BACKEND may name it.
    """
    parts = module.split(".")
    packages = [sys.modules.get(".".join(parts[: n + 1])) for n in range(len(parts))]
    return any(getattr(getattr(p, "__spec__", None), "_initializing", False) for p in packages)


def names() -> list[str]:
    """Return the names of all backends, usable here or not."""
    return [*_BUILT_IN, *(entry_point.name for entry_point in entry_points(group=GROUP))]


def automatic(precision: Precision) -> str:
    """Return the backend that "auto" stands for: native, which works on every device.

    Before 1.13 PyTorch has no bfloat16 LayerNorm on CUDA. There it is apex, as in Composer.
    """
    if _torch_compat.CUDA_NORMALISES_BFLOAT16 or not precision.engages(torch.bfloat16):
        return "native"
    try:
        apex.load()
    except ImportError as error:
        warnings.warn(
            f"torch {torch.__version__} has no fast bfloat16 LayerNorm on CUDA, and apex cannot "
            f"take its place: {error} Until then it is computed in float32: slower, not wrong.",
            RuntimeWarning,
            stacklevel=2,
        )
        return "native"
    return "apex"


for _function in (_OfAnotherPackage.__call__, _OfAnotherPackage.rms_norm):
    _torch_compat.never_a_frame_of_its_own(_function)
