"""The rules by which backward recovers xhat = (x - mean) / std where no x is kept.

y = xhat * weight + bias, and the next layer keeps the output y anyway. So xhat = (y - bias) /
weight. The rounding of y leaves an error of eps * |y / weight| in xhat. That is too much where
weight is small beside bias, and in a row whose variance is below eps, where xhat itself is small.
Where weight is 0 nothing of xhat is left. Three rules keep the gradients right:

1. A feature that cannot be recovered gets a slot, if there is one: its xhat is kept. There is a
   slot for every 32 features. The device chooses them, from the weights of this very call.
2. Where more features than that cannot be recovered, or more than one row of 32 is small, xhat is
   kept in place of y. The device counts both. The first call with a parameter waits for its counts,
   and runs again if they are too high. A later call takes the counts that have arrived from an
   earlier one, and asks for its own. (In the interpreter every call waits.)
3. xhat is kept, too, where no later call could use counts: for a weight that is no
   `torch.nn.Parameter`, and while a CUDA graph is captured.

The device alone cannot decide between y and xhat. The host tells autograd which tensor to keep, and
allocates it, before the kernels have run. A reserve for rows, like that for features, would need no
count, but a batch of small rows alone would not fit into it.

Source:
    NVIDIA apex, `memory_efficient` (pull request 1715); differs in: these rules. apex divides by
    a weight that is clamped to eps, and the gradient of a weight of 0 is wrong there.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import TypeGuard

import torch
from torch import Tensor

from lpln_autopatch.backends.protocol import Affine

WORST_RATIO = 5
"""xhat can be recovered where |bias| is at most this many times |weight|: dweight is 1 % off."""

FEATURES_PER_SLOT = 32
"""There is one slot for this many features."""

ROWS_PER_SMALL_ONE = 32
"""One row of this many may be small: its own share in dweight is noise, and dweight is right."""


@dataclasses.dataclass(slots=True)
class Recovery:
    """The place where backward finds the xhat of each feature.

    Attributes:
        slots: int32, shape (N,). From 0 on: in that column of `reserved`. -1: recovered from y.
            -2: in the kept tensor, which is xhat itself. Nothing else tells backward whether y or
            xhat is kept: non-reentrant checkpointing runs forward again, when other counts may have
            arrived, and hands its tensors to the backward of the first run.
        reserved: Columns of xhat, shape (M, ceil(N / FEATURES_PER_SLOT)), in the dtype of y.
    """

    slots: Tensor
    reserved: Tensor


def slots_for(features: int) -> int:
    """Return the number of slots for so many features."""
    return -(-features // FEATURES_PER_SLOT)


class Tally:
    """The counts of the calls with one parameter.

    Attributes:
        counts: int32, shape (2,): features that need a slot, and small rows, of the last call. Its
            kernel has set those of the next call to 0.
        arrived: A copy on the host, of one call or of the next: four bytes a count are never torn.
        rows: The rows of the call that asked for the copy.
    """

    def __init__(self, weight: Tensor) -> None:
        self.counts, self._next = (weight.new_zeros(2, dtype=torch.int32) for _ in range(2))
        # The device can copy to pinned memory while the host goes on.
        self.arrived = torch.empty(2, dtype=torch.int32, device="cpu", pin_memory=weight.is_cuda)
        self.rows = 0

    def allows_y(self, slots: int) -> bool:
        """Return True if the next call may keep y.

        The counts may be of the weights before the last step, and of other rows. So the limits are
        half of those of a call that waits.
        """
        return self._is_recoverable(slots // 2, self.rows // 2)

    def turn(self) -> tuple[Tensor, Tensor]:
        """Return the counts that the next call writes, and those that it sets to 0."""
        self.counts, self._next = now, following = self._next, self.counts
        return now, following

    def wait(self, slots: int, rows: int) -> bool:
        """Return True if the call that has just run may keep y, when its counts have arrived."""
        self.rows = rows
        self.arrived.copy_(self.counts)
        return self._is_recoverable(slots, rows)

    def send(self, counts: Tensor, rows: int) -> None:
        """Copy the counts of a call to the host when the device has written them."""
        self.rows = rows
        self.arrived.copy_(counts, non_blocking=True)

    def _is_recoverable(self, slots: int, rows: int) -> bool:
        lost, small = self.arrived.tolist()
        return bool(lost <= slots and small * ROWS_PER_SMALL_ONE <= rows)


def can_count(weight: Affine) -> TypeGuard[Tensor]:
    """Return True if counts of this call can help a later one."""
    # A weight that is a new tensor in each call, as a replica's is, would wait each time.
    return isinstance(weight, torch.nn.Parameter) and not (
        weight.is_cuda and torch.cuda.is_current_stream_capturing()
    )


# By the id: `torch.utils.weak.WeakTensorKeyDictionary` takes two to seven times as long.
tallies: dict[int, tuple[weakref.ref[Tensor], Tally]] = {}


def tally_of(weight: Tensor) -> Tally | None:
    """Return the tally of a parameter, if it has one."""
    found = tallies.get(id(weight))
    if found is None or found[0]() is not weight or found[1].counts.device != weight.device:
        return None
    return found[1]


def remember(weight: Tensor, tally: Tally) -> None:
    """Make `tally` that of a parameter, as long as this lives and stays where it is."""
    key = id(weight)

    def forget(reference: weakref.ref[Tensor]) -> None:
        if key in tallies and tallies[key][0] is reference:
            del tallies[key]

    tallies[key] = weakref.ref(weight, forget), tally
