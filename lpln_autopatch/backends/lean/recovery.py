"""What is kept for backward in place of x, and how xhat = (x - mean) / std comes out of it.

xhat = (y - bias) / weight, and the next layer keeps the output y anyway. y is rounded to the
autocast dtype, which leaves an error of eps * |y / weight| in xhat: too much where weight is
small beside bias, and everything where it is 0. Three rules keep the gradients right:

1. At most one feature of 32, those that are worst to recover with the weights of this very call,
   are not recovered: their xhat is kept. The device picks them, so nothing waits for it.
2. Where more features than that cannot be recovered, xhat is kept in place of y. To know, they
   are counted. On CPU every call counts. On CUDA the first call with a parameter waits for the
   count; a later one takes the count that has arrived from an earlier call, and sends for its own.
3. xhat is kept, too, wherever nobody can count: for a weight that is no `torch.nn.Parameter`, in
   the capture of a CUDA graph, which could not change its mind, and on other devices.

Source:
    NVIDIA apex, `memory_efficient` (pull request 1715); differs in: these rules. apex divides by
    a weight that is clamped to eps, and the gradient of a weight of 0 is wrong there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor

from lpln_autopatch.backends import fused
from lpln_autopatch.backends.autograd import NO_RECOVERY, Recovery
from lpln_autopatch.backends.protocol import Affine

WORST_RATIO = 6
"""xhat can be recovered where |bias| is at most this many times |weight|: dweight is 1 % off."""

FEATURES_PER_RESERVED = 32
"""Of so many features the xhat of one is kept beside y."""


AreFew = Callable[[Tensor, int], bool]
"""Whether so many features as cannot be recovered are at most those reserved."""


def keep(
    y: Tensor,
    x: Tensor,
    weight: Affine,
    bias: Affine,
    mean: Tensor,
    rstd: Tensor,
    are_few: AreFew | None,
) -> tuple[Tensor | None, ...]:
    """What `recover` takes: y, or xhat in y's dtype, and how to get xhat from it.

    Always as many tensors of the same shapes for the same call, and nothing else says which:
    non-reentrant checkpointing runs forward again, when a new count may have arrived, and hands
    what that keeps to the backward of the first run.

    x, weight and bias are as the kernel took them, mean and rstd = 1 / sqrt(variance + eps) those
    of each row in float32; `are_few` is what `counter` gives for the weight.
    """
    if weight is None and bias is None:
        return y, None, None, None, None
    if weight is None or are_few is None:
        return _xhat(x, mean, rstd, y.dtype), None, None, None, None
    scale = weight.flatten().float()
    if bias is None:
        shift = torch.zeros_like(scale)
    else:  # a copy: the caller may change bias before backward
        shift = bias.flatten().to(dtype=torch.float32, copy=True)
    limits = torch.finfo(y.dtype)
    # Below the smallest normal number rounding is no longer relative to y.
    recoverability = scale.abs() / (shift.abs() + limits.smallest_normal)
    reserved = -(-scale.numel() // FEATURES_PER_RESERVED)
    worst = recoverability.topk(reserved, largest=False, sorted=False).indices
    rows = x.reshape(-1, scale.numel()).index_select(1, worst)
    columns = _xhat(rows, mean.view(-1, 1), rstd.view(-1, 1), y.dtype)
    lost = (recoverability < 1 / WORST_RATIO).sum(dtype=torch.int32)
    if not are_few(lost, reserved):
        kept, shift, inverse = _xhat(x, mean, rstd, y.dtype), shift * 0, torch.ones_like(scale)
    else:
        # Where y is noise alone 0 is the better guess.
        kept, inverse = y, torch.where(recoverability > limits.eps, 1 / scale, 0.0)
    return kept, shift, inverse, worst, columns


def plan(
    x: Tensor, weight: Affine, bias: Affine, rows: int, dtype: torch.dtype
) -> tuple[str, Recovery]:
    """What the kernels of `fused` keep by the same rules: its `Plan`.

    But the features of which xhat itself is kept are those that cannot be recovered, and no others.
    """
    if weight is None and bias is None:
        return "y", NO_RECOVERY
    are_few = counter(weight)
    if weight is None or are_few is None:
        return "xhat", NO_RECOVERY
    arguments = weight, bias, rows, dtype, FEATURES_PER_RESERVED, WORST_RATIO
    recovery, reserved = fused.launcher().recovery_of(*arguments)
    if are_few(recovery[-1], reserved.shape[1]):
        return "y", (recovery, reserved)
    shift, inverse, _ = recovery[:-1].view(3, -1)
    shift.zero_()
    inverse.fill_(1)
    return "xhat", (recovery, reserved)


def _xhat(x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    return (x - mean).mul_(rstd).to(dtype=dtype)


def recover(
    kept: Tensor,
    shift: Tensor | None,
    inverse: Tensor | None,
    worst: Tensor | None,
    columns: Tensor | None,
) -> Tensor:
    """xhat in float32, a new tensor of the shape of `kept`."""
    if shift is None or inverse is None or worst is None or columns is None:
        return kept.to(dtype=torch.float32, copy=True)
    xhat = (kept.reshape(-1, shift.numel()) - shift).mul_(inverse)
    return xhat.index_copy_(1, worst, columns.float()).view(kept.shape)


def counter(weight: Affine) -> AreFew | None:
    """What counts the features that cannot be recovered with `weight`, or None if nothing can."""
    if not isinstance(weight, torch.nn.Parameter):
        return None  # a new tensor for each call, as a replica's is, would wait each time
    if weight.is_cuda:
        capturing = torch.cuda.is_current_stream_capturing()
        return None if capturing else functools.partial(_were_few, weight)
    return _are_few if weight.is_cpu else None


def _are_few(count: Tensor, reserved: int) -> bool:
    return count.item() <= reserved


def _were_few(parameter: torch.nn.Parameter, count: Tensor, reserved: int) -> bool:
    """Whether they were by the last count of this `parameter` that has arrived on the host."""
    counts = _counts()
    arrived = counts.get(parameter)
    if arrived is None:
        arrived = counts[parameter] = _pinned(count)
        latest = arrived.item()
    else:
        # Four bytes: whenever it is read, it is one count or the next.
        latest = arrived.item()
        arrived.copy_(count, non_blocking=True)
    # It may be that of the weights before the last step: half, so that others may join them.
    return latest <= reserved // 2


@functools.cache
def _counts() -> MutableMapping[Tensor, Tensor]:
    """The last count of each parameter that has arrived on the host."""
    from torch.utils.weak import WeakTensorKeyDictionary  # until torch 2.0 there is none

    return WeakTensorKeyDictionary()


def _pinned(count: Tensor) -> Tensor:
    """A copy on the host, to which the device can copy while the host goes on. It waits."""
    return torch.empty_like(count, device="cpu", pin_memory=True).copy_(count)
