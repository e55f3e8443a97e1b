"""Launch a kernel: through Triton the first time, and later as Triton has compiled it then.

Triton examines all arguments of each launch to find the compiled kernel, which takes three to four
times as long as the key here. A compiled kernel can be launched by itself, as Triton's tutorial on
a fused softmax does.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

# Triton's default changes in 3.10, and until then it warns.
_OPTIONS = {"enable_fp_fusion": True}

# until Triton 3.3: a compiled kernel takes no constants
_TAKES_CONSTANTS = [int(part) for part in re.findall(r"\d+", triton.__version__)[:2]] >= [3, 3]

_kernels: dict[tuple[Any, ...], CompiledKernel] = {}
_MOST_KERNELS = 4096  # strides are part of a key, and may be new ones in each step


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    device: int,
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[bool | int, ...],
    warps: int,
    unspecialised: int = 1,
) -> None:
    """Launch `kernel` on the current device, with all these arguments, in this order.

    Args:
        kernel: A function under `triton.jit`, which lives as long as the process.
        grid: The number of programs.
        device: The number of the current device.
        tensors: On the current device. None stands for a tensor that is not there.
        numbers: Each always an int, or always a float.
        constants: The kernel's arguments that are `tl.constexpr`.
        warps: The warps of a program.
        unspecialised: The first so many numbers are among the kernel's `do_not_specialize`.
    """
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    # Triton compiles a kernel of its own for an int of more than 32 bits.
    fits = numbers[0] < 2**31
    key = (id(kernel), device, warps, constants, numbers[unspecialised:], fits, *dtypes)
    compiled = _kernels.get(key)
    if compiled is None or not _are_aligned(tensors):
        compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=warps, **_OPTIONS)
        # The interpreter compiles nothing.
        if isinstance(compiled, CompiledKernel) and _are_aligned(tensors):
            if len(_kernels) == _MOST_KERNELS:
                _kernels.clear()
            _kernels[key] = compiled
    elif _TAKES_CONSTANTS:
        compiled[grid](*tensors, *numbers, *constants)
    else:
        compiled[grid](*tensors, *numbers)


def _are_aligned(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Return True if 16 divides all addresses. Triton compiles other kernels for these."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses & 15
