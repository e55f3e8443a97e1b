"""What normalises a lowered call: the protocol, and the choice by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from lpln_autopatch.backends import native


class Backend(Protocol):
    """Normalise `x` over its trailing dimensions in the autocast dtype, differentiably.

    Called in eager mode only, under the autocast that is in force, with the arguments of
    `torch.nn.functional.layer_norm` and the dtype of the output.

    Args:
        x: Input, shape (..., *normalized_shape), any floating dtype but float64.
        normalized_shape: The trailing dimensions over which to normalise.
        weight: Scale, shape normalized_shape, any floating dtype, or None.
        bias: Shift, shape normalized_shape, any floating dtype, or None.
        eps: Added to the variance.
        dtype: The autocast dtype of x's device, float16 or bfloat16.

    Returns:
        Tensor of the shape of `x`, in `dtype`. Statistics are computed in float32; x, weight
        and bias may be rounded to `dtype` first.

    Raises:
        RuntimeError: trailing dimensions of `x` differ from normalized_shape (PyTorch's own
            message).
    """

    def __call__(
        self,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor: ...


_BACKENDS: dict[str, Backend] = {"native": native.normalise}


def resolve(name: str) -> tuple[str, Backend]:
    """The backend that `name` chooses: its own name, and the function.

    Raises:
        ValueError: there is no backend of that name.
    """
    chosen = "native" if name == "auto" else name
    if chosen not in _BACKENDS:
        raise ValueError(
            f"backend={name!r} is not a backend. Valid: {', '.join(['auto', *_BACKENDS])}."
        )
    return chosen, _BACKENDS[chosen]
