"""The names of precisions, and the autocast dtypes for which each engages.

Free of torch, so that an environment variable can be judged while torch is being imported.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ALIASES = {
    "bf16": "amp_bf16",
    "bfloat16": "amp_bf16",
    "float16": "amp_fp16",
    "torch.bfloat16": "amp_bf16",
    "torch.float16": "amp_fp16",
}


class NoEffectWarning(UserWarning):
    """Low precision was asked for, and LayerNorm stays as PyTorch has it."""


class Precision(str, enum.Enum):
    """The condition under which norms are lowered. The names are Composer's, plus `AMP`.

    `Precision("bf16")`, `Precision("AMP_BF16")` and `Precision(torch.bfloat16)` are one member:
    case and space around a name do not matter, and dtypes and `composer.core.Precision` members
    are understood.

    Attributes:
        AMP: Engages for the autocast dtype of the moment, float16 or bfloat16.
        AMP_FP16: Engages when the autocast dtype is float16. Also `"float16"`, `torch.float16`.
        AMP_BF16: Engages when the autocast dtype is bfloat16. Also `"bf16"`, `"bfloat16"`,
            `torch.bfloat16`.
        FP32: Never engages; as an inner block it switches lowering off.
        FP16: Never engages: Composer's name for training that is float16 without autocast.
        AMP_FP8: Never engages: Composer's name for Transformer Engine's own modules.

    Source:
        MosaicML Composer, `composer.core.Precision`; differs in: `AMP`, the aliases.
    """

    AMP = "amp"
    AMP_FP16 = "amp_fp16"
    AMP_BF16 = "amp_bf16"
    FP32 = "fp32"
    FP16 = "fp16"
    AMP_FP8 = "amp_fp8"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> Precision | None:
        # Composer's members are recognised by their value: importing Composer to ask is too dear.
        name = str(value.value if isinstance(value, enum.Enum) else value).strip().lower()
        return _MEMBERS.get(name)

    @classmethod
    def parse(cls, value: object, source: str) -> Precision:
        """Return `Precision(value)`, or raise a ValueError that names `source`.

        From outside of the program "fp16" is an error: trainers mean autocast to float16 by it, and
        Composer means training without autocast.

        Args:
            value: A name, a dtype, or a member of Composer's enum.
            source: The argument, the option or the variable that held it.
        """
        from_outside = source in ("LPLN_PRECISION", "--precision")
        try:
            precision = (isinstance(value, str) and _MEMBERS.get(value)) or cls(value)
        except ValueError:
            valid = [*(str(member) for member in cls), *_ALIASES]
            hint = ""
            if from_outside:
                valid = [*(name for name in valid if name != "fp16"), "off"]
                if str(value).strip().lower() in ("1", "true", "on", "yes"):
                    hint = " Set amp: whatever autocast runs in."
            raise ValueError(
                f"{source}={value!r} is not a precision.{hint} Valid: {', '.join(valid)}."
            ) from None
        if from_outside and precision is cls.FP16:
            raise ValueError(
                f"{source}={value!r} lowers nothing: it is Composer's name for a training without "
                "autocast. Where autocast runs in float16, set amp_fp16."
            )
        return precision

    @property
    def ever_engages(self) -> bool:
        """True if this precision engages for an autocast dtype."""
        return self in _ENGAGES

    def engages(self, autocast_dtype: torch.dtype) -> bool:
        """Return True if norms are lowered under autocast to `autocast_dtype`."""
        return str(autocast_dtype) in _ENGAGES.get(self, ())


_MEMBERS = {member.value: member for member in Precision}
_MEMBERS |= {alias: _MEMBERS[name] for alias, name in _ALIASES.items()}
_ENGAGES = {
    Precision.AMP: ("torch.float16", "torch.bfloat16"),
    Precision.AMP_FP16: ("torch.float16",),
    Precision.AMP_BF16: ("torch.bfloat16",),
}
