"""Runs of a forward that is tried: on small random inputs, for modules of several sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch._hand_written.form import Run, gradients_of
from lpln_autopatch._hand_written.stand_in import NotANorm, Shape, StandIn, State, resized

_BATCHES = {1: (), 2: (9,), 3: (5, 2), 4: (3, 2, 2), 5: (3, 2, 1, 2)}
_SCALES = (1.0, 0.0, 1e-4, 1e-2, 1e2, 1e6)  # of the first rows


class Failed(NotANorm):
    """The forward raised in every trial, perhaps for a reason of the moment."""


class Trials:
    """Runs of a forward for modules of `size` features, or of any if that is 0.

    Args:
        cls: The class of the module.
        forward: Takes the module and one tensor.
        state: The attributes that it may read from the module.
        size: The number of features of the module.
        deadline: The time of `time.monotonic` at which nobody waits for the answer any more.
    """

    def __init__(
        self, cls: type, forward: Callable[..., Any], state: State, size: int, deadline: float
    ) -> None:
        self._cls, self._forward, self._state = cls, forward, state
        self._deadline = deadline
        self._generator = torch.Generator().manual_seed(0)
        self.size = size

    def modules(
        self, size: int, training: bool, scale: float
    ) -> tuple[StandIn, StandIn, dict[str, Tensor]]:
        """Return a module, one in the other mode, and the tensors that both have."""
        state = self._state
        if self.size:
            state = resized(state, self.size, size)
        tensors: dict[str, Tensor] = {
            name: torch.nn.Parameter(scale * self.random(*value))
            for name, value in state.items()
            if isinstance(value, Shape)
        }
        first, twin = (
            StandIn(self._cls, state, tensors, mode, self._deadline)
            for mode in (training, not training)
        )
        return first, twin, tensors

    def random(self, *shape: int) -> Tensor:
        """Return random numbers in float32, without a draw from the program's generators."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")

    def input(
        self, rank: int, dim: int, size: int, zeros: bool = True, specials: bool = False
    ) -> Tensor:
        """Return an input whose rows have several scales."""
        batch = list(_BATCHES[rank])
        for shape in self._state.values():
            if isinstance(shape, Shape) and dim == -1:  # such as (heads, 1, size)
                for at, n in enumerate(reversed(shape[:-1])):
                    if n != 1 and at < len(batch):
                        batch[-1 - at] = n
        rows = self.random(math.prod(batch), size)
        for row, scale in zip(rows, _SCALES, strict=False):
            row *= scale if zeros or scale else 1.0
        rows[6:7, 0] *= 1e3 * size  # one value that is larger than the rest of its row
        if specials:
            for row, value in zip(rows, (math.nan, 0.0, math.inf, -math.inf), strict=False):
                row[0] = value
        return rows.reshape(*batch, size).movedim(-1, dim).contiguous()

    def call_as_it_is(self, module: StandIn, x: Tensor) -> Any:
        """Return the output of the forward, or raise its own exception."""
        return module.run(self._forward, x)

    def call(self, module: StandIn, x: Tensor) -> Tensor:
        """Return the output of the forward, of the shape of the float32 tensor `x`.

        Raises:
            Failed: the forward raises.
            NotANorm: the output has another shape or dtype.
        """
        try:
            y = self.call_as_it_is(module, x)
        except NotANorm:
            raise
        except Exception as error:
            message = str(error).strip().partition("\n")[0]
            raise Failed(f"its forward raises {type(error).__name__}: {message}") from None
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype is not torch.float32:
            raise NotANorm("its output has not the shape and dtype of its input")
        return y

    def run(
        self, module: StandIn, tensors: Mapping[str, Tensor], rank: int, dim: int, size: int
    ) -> Run:
        """Run the forward of `module` and its backward, on an input with `size` features."""
        x = self.input(rank, dim, size).requires_grad_()
        y = self.call(module, x)
        if y.isnan().any():  # a row of zeros gives NaN if there is no eps, and so do its gradients
            x = self.input(rank, dim, size, zeros=False).requires_grad_()
            y = self.call(module, x)
        if not y.requires_grad:
            raise NotANorm("its output has no gradient")
        dy = self.random(*x.shape)
        gradients = gradients_of(y, dy, [x, *tensors.values()])
        if any(gradient is None for gradient in gradients):
            raise NotANorm("a tensor that it reads gets no gradient")
        return Run(x, y, tensors, dy, gradients)
