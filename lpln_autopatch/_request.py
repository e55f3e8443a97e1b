"""Requests: a precision, a backend and norms, from the environment, a call, a block or surgery.

Functions import torch here, and the module does not: with LPLN_PRECISION set, the import of torch
imports this module, which must be whole by then.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from typing import TYPE_CHECKING

from lpln_autopatch._precision import NoEffectWarning, Precision

if TYPE_CHECKING:
    import torch

    from lpln_autopatch.backends import Backend


HAND_WRITTEN = "hand_written"
"""The name of the norms that classes compute without PyTorch's functions."""


def norm_names() -> tuple[str, ...]:
    """Return the names of the norms that can be lowered with this torch."""
    from lpln_autopatch._torch_compat import HAS_RMS_NORM

    later = ("rms_norm", HAND_WRITTEN) if HAS_RMS_NORM else ()
    return ("layer_norm", "group_norm", *later)


@dataclasses.dataclass(frozen=True)
class Request:
    """A precision, a backend and norms. The hot path reads the active one.

    Dynamo reads an attribute again for its guards after it has compiled, and another thread may
    have made another request active by then. So `norms` and `dtypes` have one shape in all
    requests.

    Attributes:
        precision: When norms are lowered.
        backend: The name of the chosen backend, never "auto".
        norms: The names of the norms that are lowered, with commas between them; "" lowers none.
        dtypes: The autocast dtypes for which `precision` engages, twice the same if it is one.
        normalise: The backend. It normalises LayerNorm, and RMSNorm if it has an `rms_norm`.
        source: "environment", "enable", "block" or "surgery".
    """

    precision: Precision
    backend: str
    norms: str
    dtypes: tuple[torch.dtype, ...]
    normalise: Backend
    source: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        norms = self.norms.replace(",", ", ")
        return f"{norms}: precision {self.precision}, backend {self.backend}"

    @classmethod
    def parse(cls, precision: object, backend: str, norms: object, source: str) -> Request:
        """Return the request that these names make, or raise as `enable` does."""
        # Before our own modules import it: the first import of torch comes back to us if
        # LPLN_PRECISION is set, and must not find one of our modules half imported.
        import torch  # noqa: F401

        # In the middle of torch's own import this raises. Importing a part of torch out of turn
        # there may end the process later (torch 2.9).
        from torch import Tensor  # noqa: F401

        from lpln_autopatch import backends

        argument = "LPLN_PRECISION" if source == "environment" else "precision"
        parsed = Precision.parse(precision, argument)
        named = parse_norms(norms)
        name, normalise = backends.resolve(backend, parsed)
        return _made(parsed, name, named, normalise, source)  # type: ignore[arg-type]

    @classmethod
    def again(cls, precision: str, backend: str) -> Request:
        """Return the request of a saved module, with native if its backend is missing here."""
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
        """Warn that this request lowers nothing."""
        warnings.warn(
            f"precision {str(self.precision)!r} never engages: norms stay as PyTorch has them. "
            "Use 'amp', 'amp_fp16' or 'amp_bf16' to run them in the autocast dtype.",
            NoEffectWarning,
            stacklevel=stacklevel + 1,
        )


@functools.lru_cache(maxsize=32)  # a program may make a block for every step
def _made(
    precision: Precision, backend: str, norms: tuple[str, ...], normalise: Backend, source: str
) -> Request:
    import torch

    dtypes = [d for d in (torch.float16, torch.bfloat16) if precision.engages(d)]
    return Request(precision, backend, ",".join(norms), (*dtypes, *dtypes)[:2], normalise, source)


def parse_norms(value: object) -> tuple[str, ...]:
    """Return the norms that the argument `norms` of `enable` names, in a fixed order."""
    valid = norm_names()
    source = "norms"
    if value is None:
        value, source = os.environ.get("LPLN_NORMS") or "layer_norm", "LPLN_NORMS"
    if isinstance(value, str) and value in valid:
        return (value,)
    given = value.split(",") if isinstance(value, str) else value
    try:
        names = [str(name).strip().lower() for name in given]  # type: ignore[attr-defined]
    except TypeError:
        names = [repr(given)]
    wrong = [name for name in names if name not in (*valid, "all")]
    if wrong or not names:
        what = f"{wrong[0]!r} is not a norm" if wrong else "no norm is named"
        hint = "" if "rms_norm" in valid else " (rms_norm, hand_written: from torch 2.4 on)"
        raise ValueError(f"{source}={value!r}: {what}. Valid: {', '.join(valid)}, all{hint}.")
    return tuple(name for name in valid if name in names or "all" in names)
