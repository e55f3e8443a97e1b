"""The protocol of a backend, and the types of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

Shape = Sequence[int]
"""The trailing dimensions over which a LayerNorm normalises."""

Affine = torch.Tensor | None
"""A scale or a shift: shape normalized_shape, any floating dtype; or None."""


class Backend(Protocol):
    """A function, or another callable, that normalises a lowered call in eager mode.

    It normalises LayerNorm. A backend with an attribute `rms_norm`, called as `rms_norm(x,
    normalized_shape, weight, eps, dtype)`, normalises RMSNorm as well. For others native does.
    """

    def __call__(
        self,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Normalise `x` over its trailing dimensions in the autocast dtype, differentiably.

        It is called inside the caller's autocast, with the arguments of
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
