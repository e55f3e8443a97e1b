"""What is active now, and where it came from."""

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
    """What is active, and where it came from. Prints as a table.

    Attributes:
        precision: The active precision, or None.
        backend: What normalises, or None.
        norms: The names of the norms that are lowered, or None.
        source: "environment", "enable" or "block", or None.
        installed: Whether PyTorch's functions run our code.
        environment: LPLN_PRECISION as it is set now, or None. With a precision here and none
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
    """Return what is active now, and where it came from.

    Returns:
        A snapshot, which prints as a table.
    """
    import torch  # first, for the reason that Request.parse gives
    import wrapt

    from lpln_autopatch import __version__

    request = _state.current()
    asked = ("precision", "backend", "norms", "source")
    return Status(
        **{name: getattr(request, name, None) for name in asked},
        installed=_state.is_installed(),
        environment=os.environ.get("LPLN_PRECISION"),
        versions={
            "lpln_autopatch": __version__,
            "torch": str(torch.__version__),
            "wrapt": wrapt.__version__,  # type: ignore[attr-defined]
            "python": platform.python_version(),
        },
    )
