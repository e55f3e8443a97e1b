"""A plan of the kernels: all that the calls of a norm with tensors of one kind have in common."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpln_autopatch.backends.fused import backward_kernels, forward_kernels, grid
from lpln_autopatch.backends.fused.launch import INTERPRETED, Launch
from lpln_autopatch.backends.fused.launch import takes_cpu as takes_cpu
from lpln_autopatch.backends.fused.recovery import Recovery, slots_for
from lpln_autopatch.backends.protocol import Affine

_MOST_LAUNCHES = 64  # of backward: the strides of dy may be new ones in each step


class Result(NamedTuple):
    """The result of a forward pass, and all that it keeps.

    Attributes:
        y: The result, contiguous, shape of x.
        kept: x, xhat = (x - mean) / sqrt(variance + eps) in the dtype of `y`, or `y`. Or None.
        statistics: 1 / sqrt(variance + eps) of each of the M rows, float32, shape (1, M); with the
            mean, if x is kept, shape (2, M). Or None.
        recovery: Where backward finds xhat, or None: in `kept`.
    """

    y: Tensor
    kept: Tensor | None
    statistics: Tensor | None
    recovery: Recovery | None


class Plan:
    """Runs the kernels for calls that differ in the values of their tensors alone.

    Attributes:
        n_dims: The trailing dimensions that are normalised.
        rows: The rows of x.
        slots: How many features have a slot.
        eps: Added to the variance.
        dtype: The dtype of the result.
        dtypes: Those of x, weight and bias; float32 for one that is None.
        saved: The dtypes and sizes of what `FusedNorm` saves, by whether x is kept.
        centred: Subtract the mean, as a LayerNorm does; an RMSNorm does not.
        lean: Keep y for backward, if xhat can be recovered from it.
        counts_arrive_late: Counts take a while from the device to the host.
    """

    counts_arrive_late = not INTERPRETED

    def __init__(
        self,
        x: Tensor,
        n_dims: int,
        weight: Affine,
        bias: Affine,
        eps: float,
        dtype: torch.dtype,
        centred: bool,
        lean: bool,
    ) -> None:
        """Make a plan for calls with tensors such as these.

        Args:
            x: Input, shape (..., *normalized_shape), float32, float16 or bfloat16, any strides.
            n_dims: The length of normalized_shape. It is an attribute, as are eps and what follows.
            weight: Scale, shape normalized_shape, contiguous, float, or None.
            bias: Shift, the same.
        """
        self._features = x.shape[-n_dims:]
        self._n = self._features.numel()
        self.n_dims, self.rows = n_dims, x.numel() // self._n
        self.slots = slots_for(self._n)
        self.eps, self.dtype, self.centred, self.lean = float(eps), dtype, centred, lean
        self.dtypes = [torch.float32 if t is None else t.dtype for t in (x, weight, bias)]
        of_x, of_weight, of_bias = self.dtypes
        n, m = self._n, self.rows
        self.saved = {
            is_x: (
                (of_x if is_x else dtype, m * n),
                (torch.float32, (1 + (centred and is_x)) * m),
                (of_weight, n),
                (of_bias, n),
                (torch.int32, n),
                (dtype, m * self.slots),
            )
            for is_x in (False, True)
        }
        self._device = x.get_device()
        self._multiprocessors = _multiprocessors(x.device)
        # The layout alone is asked for, not a copy of x.
        alike = torch.empty_strided(x.shape, x.stride(), device="meta")
        read, self._layout = grid.layout(alike, n_dims, self._n)
        self._copies_x = read is not alike
        self._forward_launches: dict[tuple[Any, ...], Launch] = {}
        self._backward_launches: dict[tuple[Any, ...], _Backward] = {}

    def forward(
        self,
        x: Tensor,
        weight: Affine,
        bias: Affine,
        keep: str | None = None,
        counts: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    ) -> Result:
        """Normalise `x`, and keep "x", "xhat" or "y" for backward, or nothing.

        With the counts of a `Tally` backward recovers xhat from y, or finds it in its place.
        """
        y = torch.empty_like(x, dtype=self.dtype, memory_format=torch.contiguous_format)
        kept = statistics = xhat = recovery = slots = reserved = None
        if keep is not None:
            with_mean = self.centred and keep == "x"
            statistics = x.new_empty(1 + with_mean, self.rows, dtype=torch.float32)
            kept = y
            if keep == "x":
                kept = x
            elif keep == "xhat":
                kept = xhat = torch.empty_like(y)
            if counts[0] is not None:
                # Numbers and no tuples, which take `new_empty` twice as long.
                slots = x.new_empty(self._n, dtype=torch.int32)
                reserved = x.new_empty(self.rows, self.slots, dtype=self.dtype)
                recovery = Recovery(slots, reserved)
        launch = self._forward_launches.get((keep, recovery is None))
        if launch is None:
            launch = self._plan_forward(keep)
            self._forward_launches[keep, recovery is None] = launch
        launch(
            (x.contiguous() if self._copies_x else x, weight, bias),
            (y, statistics, xhat, slots, reserved, *counts),
        )
        return Result(y, kept, statistics, recovery)

    def _plan_forward(self, keep: str | None) -> Launch:
        tile = grid.tile(self._n, grid.LOOPED_FORWARD)
        _, smallest = _limits(self.dtype)
        with_mean = self.centred and keep == "x"
        return Launch(
            forward_kernels.norm_forward_looped if tile.looped else forward_kernels.norm_forward,
            (-(-self.rows // tile.rows), 1, 1), self._device,
            (self.rows, self._n, self.eps, smallest, *self._layout),
            (self.centred, with_mean, tile.rows, tile.block), tile.warps,
        )  # fmt: skip

    def backward(
        self,
        dy: Tensor,
        kept: Tensor,
        statistics: Tensor,
        weight: Affine,
        bias: Affine,
        recovery: Recovery | None,
        wanted: tuple[bool, ...],
        is_x: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the gradients of x, weight and bias.

        Args:
            dy: The gradient of y, in its dtype, any strides.
            kept: Of a `Result`; any strides.
            statistics: Of the same; contiguous. So is the recovery.
            weight: As in forward. So is bias, without which nothing is recovered.
            wanted: True for each of the three that is computed. The others are None.
            is_x: True if x itself was kept.
        """
        kept, kept_layout = grid.layout(kept, self.n_dims, self._n)
        dy, dy_layout = grid.layout(dy, self.n_dims, self._n)
        key = wanted, is_x, recovery is None, kept_layout, dy_layout
        launches = self._backward_launches.get(key)
        if launches is None:
            launches = self._plan_backward(is_x, recovery is not None, kept_layout + dy_layout)
            if len(self._backward_launches) >= _MOST_LAUNCHES:
                self._backward_launches.clear()
            self._backward_launches[key] = launches
        of_x, of_weight, of_bias = self.dtypes
        dx = dweight = dbias = partials = slots = reserved = None
        # For a torch.Size `new_empty` takes twice as long as `empty_like`.
        if wanted[0]:
            dx = torch.empty_like(kept, dtype=of_x, memory_format=torch.contiguous_format)
        if wanted[1] or wanted[2]:
            parameter = kept.new_empty(self._features) if weight is None else weight
            dweight = torch.empty_like(parameter, dtype=of_weight) if wanted[1] else None
            dbias = torch.empty_like(parameter, dtype=of_bias) if wanted[2] else None
            partials = kept.new_empty(2, launches.programs, self._n, dtype=torch.float32)
        if recovery is not None:
            slots, reserved = recovery.slots, recovery.reserved
        launches.of_rows((kept, dy, statistics, weight, bias, slots, reserved), (dx, partials))
        if partials is not None:
            launches.of_sums((), (partials, dweight, dbias))
        return dx, dweight, dbias

    def _plan_backward(self, is_x: bool, recovers: bool, layouts: tuple[int, ...]) -> _Backward:
        tile, programs, stages = grid.backward(self.rows, self._n, self._multiprocessors, recovers)
        of_rows = Launch(
            backward_kernels.norm_backward_looped
            if tile.looped
            else backward_kernels.norm_backward,
            (programs, 1, 1), self._device,
            (self.rows, self._n, *_limits(self.dtype), *layouts),
            (self.centred, is_x, tile.rows, tile.block, stages), tile.warps,
        )  # fmt: skip
        of_sums = Launch(
            backward_kernels.norm_reduce, (-(-self._n // grid.REDUCED[1]), 2, 1), self._device,
            (programs, self._n), grid.REDUCED, 4,
        )  # fmt: skip
        return _Backward(programs, of_rows, of_sums)


class _Backward(NamedTuple):
    programs: int
    of_rows: Launch
    of_sums: Launch


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    """Return the eps of `dtype`, and its smallest normal number."""
    limits = torch.finfo(dtype)
    return limits.eps, limits.smallest_normal


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted: a few, so that each goes through several tiles
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
