"""`status`: the active request, where it came from, and the versions."""

from __future__ import annotations

import dataclasses
import os
import platform
from typing import TYPE_CHECKING

from lpln_autopatch import _state, _tables

if TYPE_CHECKING:
    from lpln_autopatch._precision import Precision


@dataclasses.dataclass(frozen=True)
class Status:
    """The active request, and where it came from. Prints as a table.

    Attributes:
        precision: The active precision, or None.
        backend: The name of the backend, or None.
        norms: The names of the norms that are lowered, or None.
        source: "environment", "enable" or "block", or None.
        installed: True if PyTorch's functions run our code.
        environment: The value of LPLN_PRECISION now, or None. If it names a precision and none is
            active, no route has read it: see docs/activation.md.
        versions: Of lpln_autopatch, torch, wrapt and python.
    """

    precision: Precision | None
    backend: str | None
    norms: tuple[str, ...] | None
    source: str | None
    installed: bool
    environment: str | None
    versions: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(f"{name:12} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        return _tables.html(self._rows(), False)

    def _rows(self) -> list[tuple[str, str]]:
        rows = {**vars(self), "versions": ", ".join(f"{k} {v}" for k, v in self.versions.items())}
        rows["norms"] = self.norms and ", ".join(self.norms)
        return [(name, str(value)) for name, value in rows.items()]


def status() -> Status:
    """Return the active request, and where it came from.

    Returns:
        A snapshot, which prints as a table.
    """
    import torch  # first: see Request.parse
    import wrapt

    from lpln_autopatch import __version__

    request = _state.current()
    return Status(
        **{name: getattr(request, name, None) for name in ("precision", "backend", "source")},
        norms=None if request is None else tuple(request.norms.split(",")),
        installed=_state.is_installed(),
        environment=os.environ.get("LPLN_PRECISION"),
        versions={
            "lpln_autopatch": __version__,
            "torch": str(torch.__version__),
            "wrapt": wrapt.__version__,  # type: ignore[attr-defined]
            "python": platform.python_version(),
        },
    )
