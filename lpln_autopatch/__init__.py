"""LayerNorm in the autocast dtype, for every PyTorch program, without a change to its code.

    LPLN_PRECISION=amp python train.py

The public names are loaded at their first use. Importing this package imports neither torch nor
wrapt, so that torch loads our entry point at no cost.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "LPLayerNorm",
    "NoEffectWarning",
    "Precision",
    "apply_low_precision_layernorm",
    "disable",
    "enable",
    "exempt",
    "low_precision_layernorm",
    "report",
    "revert_low_precision_layernorm",
    "status",
]

if TYPE_CHECKING:
    from lpln_autopatch._activation import disable, enable, exempt, low_precision_layernorm
    from lpln_autopatch._precision import NoEffectWarning, Precision
    from lpln_autopatch._report import report
    from lpln_autopatch._status import status
    from lpln_autopatch.surgery import (
        LPLayerNorm,
        apply_low_precision_layernorm,
        revert_low_precision_layernorm,
    )

_HOMES = {
    "_precision": "NoEffectWarning Precision",
    "_activation": "disable enable exempt low_precision_layernorm",
    "_status": "status",
    "_report": "report",
    "surgery": "LPLayerNorm apply_low_precision_layernorm revert_low_precision_layernorm",
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names.split():
            globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
