"""How backward gets xhat = (x - mean) / std where no x is kept.

y = xhat * weight + bias, and the next layer keeps the output y anyway. So xhat = (y - bias) /
weight. y is rounded to the autocast dtype, which leaves an error of eps * |y / weight| in xhat: too
much where weight is small beside bias, everything where it is 0, and too much beside an xhat that
is small itself, as in a row whose variance is below eps. Three rules keep the gradients right:

1. A feature that cannot be recovered gets a slot, if there is one: its xhat is kept. There is one
   for every 32 features. The device chooses, from the weights of this very call.
2. Where more features than that cannot be recovered, or more than one row of 32 is small, xhat is
   kept in place of y. To know, the device counts both. The first call with a parameter waits for
   the counts, and runs again if they are too high. A later one takes the counts that have arrived
   from an earlier call, and sends for its own. (In the interpreter every call waits.)
3. xhat is kept, too, wherever counts help nobody: for a weight that is no `torch.nn.Parameter`, and
   while a CUDA graph is captured, which could not change its mind.

Source:
    NVIDIA apex, `memory_efficient` (pull request 1715); differs in: these rules. apex divides by
    a weight that is clamped to eps, and the gradient of a weight of 0 is wrong there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import MutableMapping

import torch
from torch import Tensor

from lpln_autopatch.backends.protocol import Affine

WORST_RATIO = 5
"""xhat can be recovered where |bias| is at most this many times |weight|: dweight is 1 % off."""

FEATURES_PER_SLOT = 32
"""Of so many features the xhat of one is kept beside y."""

ROWS_PER_SMALL_ONE = 32
"""Of so many rows one may be small: of its share in dweight little is left, and of dweight all."""


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Where backward finds the xhat of each feature.

    Attributes:
        slots: int32, shape (N,). Not negative: in that column of `reserved`. -1: recovered from y.
            -2: in what is kept, which is xhat itself. Nothing else says which of the two is kept:
            non-reentrant checkpointing runs forward again, when other counts may have arrived, and
            hands what that keeps to the backward of the first run.
        reserved: Columns of xhat, shape (M, ceil(N / FEATURES_PER_SLOT)), in the dtype of y.
    """

    slots: Tensor
    reserved: Tensor

    @classmethod
    def empty(cls, weight: Tensor, rows: int, dtype: torch.dtype) -> Recovery:
        """Allocate one for `rows` rows of a y in `dtype`."""
        features = weight.numel()
        return cls(
            weight.new_empty(features, dtype=torch.int32),
            weight.new_empty((rows, -(-features // FEATURES_PER_SLOT)), dtype=dtype),
        )


@dataclasses.dataclass
class Tally:
    """The counts of the calls with one parameter.

    Attributes:
        counts: int32, shape (2,): features that need a slot, and small rows. The kernels write it.
        arrived: A copy on the host, of one call or of the next one: it is four bytes a count.
        rows: Of the call that sent for it.
    """

    counts: Tensor
    arrived: Tensor
    rows: int

    @classmethod
    def first(cls, counts: Tensor, rows: int) -> Tally:
        """Make one from the first counts of a parameter, for which it waits."""
        # In memory to which the device can copy while the host goes on.
        arrived = torch.empty_like(counts, device="cpu", pin_memory=True)
        return cls(counts, arrived.copy_(counts), rows)

    def allows_y(self, slots: int) -> bool:
        """Return True if the next call may keep y.

        The counts may be those of the weights before the last step, and of other rows. So they may
        be half of what they could be, and others may join.
        """
        return is_recoverable(self.arrived, slots // 2, self.rows // 2)

    def send(self, rows: int) -> None:
        """Have the counts copied when the device has them."""
        self.arrived.copy_(self.counts, non_blocking=True)
        self.rows = rows


def is_recoverable(counts: Tensor, slots: int, rows: int) -> bool:
    """Return True if the slots are enough, and few of the rows are small. It waits for `counts`."""
    lost, small = counts.tolist()
    return bool(lost <= slots and small * ROWS_PER_SMALL_ONE <= rows)


def can_count(weight: Affine) -> bool:
    """Return True if counts of this call can help a later one."""
    # A new tensor for each call, as a replica's weight is, would wait each time.
    return isinstance(weight, torch.nn.Parameter) and not (
        weight.is_cuda and torch.cuda.is_current_stream_capturing()
    )


def arrive_late(weight: Tensor) -> bool:
    """Return True if counts take a while from the device to the host."""
    return weight.is_cuda


@functools.cache
def tallies() -> MutableMapping[Tensor, Tally]:
    """Return the tally of each parameter that has one."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()
