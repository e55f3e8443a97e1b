"""Launch a kernel: through Triton the first time, and later as Triton has compiled it then.

Triton examines all arguments of each launch to find the compiled kernel, which takes most of the
host's time. A compiled kernel can be launched by itself, as Triton's tutorial on a fused softmax
does. In the versions of Triton that are known its launcher is called, which takes half of that.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

# Triton's default changes in 3.10, and until then it warns.
_OPTIONS = {"enable_fp_fusion": True}

_VERSION = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])

# until Triton 3.3: a compiled kernel takes no constants
_TAKES_CONSTANTS = _VERSION >= (3, 3)

# The versions that call the launcher with the arguments below, and have hooks where `_has_hooks`
# looks for them. tests/test_fused.py compares the arguments with Triton's own.
_HAS_KNOWN_LAUNCHER = (3, 6) <= _VERSION <= (3, 9)

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
    elif _HAS_KNOWN_LAUNCHER and not _has_hooks():
        stream = triton.runtime.driver.active.get_current_stream(device)
        # None: no metadata for hooks, and no hooks.
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *tensors, *numbers, *constants,
        )  # fmt: skip
    elif _TAKES_CONSTANTS:
        compiled[grid](*tensors, *numbers, *constants)
    else:
        compiled[grid](*tensors, *numbers)


def _has_hooks() -> bool:
    """Return True if somebody, such as a profiler, wants to know of launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _are_aligned(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Return True if 16 divides all addresses. Triton compiles other kernels for these."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses & 15
