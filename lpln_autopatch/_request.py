"""What somebody asks for: a precision, a backend and norms, by name, from whichever way in.

torch is imported by what needs it, not by this module: with LPLN_PRECISION set, importing torch
comes back here, and must find a module that is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from typing import TYPE_CHECKING

from lpln_autopatch._precision import NoEffectWarning, Precision

if TYPE_CHECKING:
    from lpln_autopatch._forward import Lowering
    from lpln_autopatch.backends import Backend


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody asked for.

    Attributes:
        precision: When norms are lowered.
        backend: The name of what normalises, as it was chosen: never "auto".
        norms: The names of the norms that are lowered.
        source: "environment", "enable", "block" or "surgery".
        lowering: What the hot path reads while this request is in force.
    """

    precision: Precision
    backend: str
    norms: tuple[str, ...]
    source: str
    lowering: Lowering

    def __str__(self) -> str:
        return f"{', '.join(self.norms)}: precision {self.precision}, backend {self.backend}"

    @classmethod
    def parse(cls, precision: object, backend: str, norms: object, source: str) -> Request:
        """The request that these names make, or what `enable` raises."""
        # Before our own modules that import it: if this is its first import and LPLN_PRECISION
        # is set, it comes back to us, and must not find one of them half imported.
        import torch  # noqa: F401

        # In the middle of torch's own import this raises. Importing a part of torch out of turn
        # there may end the process later (torch 2.9).
        from torch import Tensor  # noqa: F401

        from lpln_autopatch import backends

        argument = "LPLN_PRECISION" if source == "environment" else "precision"
        parsed = Precision.parse(precision, argument)
        named = parse_norms(norms)
        name, normalise = backends.resolve(backend, parsed)
        return _made(parsed, name, named, source, normalise)  # type: ignore[arg-type]

    @classmethod
    def again(cls, precision: str, backend: str) -> Request:
        """What was asked for where a module was saved; natively if its backend is missing here."""
        try:
            return cls.parse(precision, backend, "layer_norm", "surgery")
        except (ImportError, ValueError) as error:
            warnings.warn(
                "A LayerNorm was saved with a backend that cannot be used here, and is normalised "
                f"natively: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return cls.parse(precision, "native", "layer_norm", "surgery")

    def warn_never_engages(self, stacklevel: int) -> None:
        """Say that this request lowers nothing."""
        warnings.warn(
            f"precision {str(self.precision)!r} never engages: norms stay as PyTorch has them. "
            "Use 'amp', 'amp_fp16' or 'amp_bf16' to run them in the autocast dtype.",
            NoEffectWarning,
            stacklevel=stacklevel + 1,
        )


@functools.lru_cache(maxsize=32)  # a block may be made for every step
def _made(
    precision: Precision, backend: str, norms: tuple[str, ...], source: str, normalise: Backend
) -> Request:
    import torch

    from lpln_autopatch._forward import Lowering

    dtypes = [d for d in (torch.float16, torch.bfloat16) if precision.engages(d)]
    lowering = Lowering(str(precision), tuple(dtypes * 2)[:2], ",".join(norms), normalise)
    return Request(precision, backend, norms, source, lowering)


def parse_norms(value: object) -> tuple[str, ...]:
    """Return the norms that the argument `norms` of `enable` names, in the order of `NAMES`."""
    from lpln_autopatch._norms import NAMES

    source = "norms"
    if value is None:
        value, source = os.environ.get("LPLN_NORMS") or "layer_norm", "LPLN_NORMS"
    if isinstance(value, str) and value in NAMES:
        return (value,)
    given = value.split(",") if isinstance(value, str) else value
    try:
        names = [str(name).strip().lower() for name in given]  # type: ignore[attr-defined]
    except TypeError:
        names = [repr(given)]
    wrong = [name for name in names if name not in (*NAMES, "all")]
    if wrong or not names:
        what = f"{wrong[0]!r} is not a norm" if wrong else "no norm is named"
        hint = "" if "rms_norm" in NAMES else " (rms_norm, hand_written: from torch 2.4 on)"
        raise ValueError(f"{source}={value!r}: {what}. Valid: {', '.join(NAMES)}, all{hint}.")
    return tuple(name for name in NAMES if name in names or "all" in names)
