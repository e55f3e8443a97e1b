"""Launch a kernel: through Triton the first time, and later as Triton has compiled it then.

Triton examines all arguments of each launch to find the compiled kernel, which takes most of the
host's time. A compiled kernel can be launched by itself, as Triton's tutorial on a fused softmax
does. In the versions of Triton that are known its launcher is called, which takes half of that.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from lpln_autopatch.backends.fused import tiles

INTERPRETED: bool = tiles.INTERPRETED.value

# Triton's default changes in 3.10, and until then it warns.
OPTIONS = {"enable_fp_fusion": True}

_VERSION = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])

# until Triton 3.3: a compiled kernel takes no constants
_TAKES_CONSTANTS = _VERSION >= (3, 3)

# The versions that call the launcher with the arguments below, and have hooks where `_has_hooks`
# looks for them. tests/test_fused.py compares the arguments with Triton's own.
_HAS_KNOWN_LAUNCHER = (3, 6) <= _VERSION <= (3, 9)

_runtime: Any = triton.knobs.runtime if _HAS_KNOWN_LAUNCHER else None

# The interpreter has one grid for all threads.
_interpreter: Any = threading.RLock() if INTERPRETED else contextlib.nullcontext()


@functools.cache
def takes_cpu() -> bool:
    """Return True if Triton launches kernels on CPU tensors: its driver says on which."""
    if INTERPRETED:
        return True
    try:
        device: torch.device = triton.runtime.driver.active.get_active_torch_device()
    except RuntimeError:  # there is no driver, as on a machine without a GPU
        return False
    return device.type == "cpu"


class Launch:
    """A kernel with all its arguments but the tensors.

    It is called with tensors of the same dtypes each time, and with None in the same places.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        device: int,
        numbers: tuple[int | float, ...],
        constants: tuple[bool | int, ...],
        warps: int,
    ) -> None:
        """Compile nothing yet.

        Args:
            kernel: A function under `triton.jit`. Its arguments are the tensors, the numbers and
                the constants, in this order.
            grid: The number of programs.
            device: The number of the tensors' device.
            numbers: The arguments after the tensors.
            constants: The arguments that are `tl.constexpr`.
            warps: The warps of a program.
        """
        self._kernel, self._grid, self._device, self._warps = kernel, grid, device, warps
        self._after_tensors = *numbers, *constants
        self._after_tensors_compiled = self._after_tensors if _TAKES_CONSTANTS else numbers
        self._compiled: CompiledKernel | None = None

    def __call__(
        self, given: tuple[Tensor | None, ...], allocated: tuple[Tensor | None, ...]
    ) -> None:
        """Launch the kernel on the current stream of the device.

        Args:
            given: The first tensors, which may lie at any address. None stands for one that is not
                there.
            allocated: The others, which this package has allocated.
        """
        # Triton launches on the current device, which need not be that of the tensors.
        if self._device >= 0 and self._device != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                self(given, allocated)
            return
        compiled = self._compiled
        if compiled is None or not _are_aligned(given):
            self._let_triton_launch(given, allocated)
        elif _HAS_KNOWN_LAUNCHER and not _has_hooks():
            stream = self._stream(self._device)
            compiled.run(
                *self._grid, stream, *self._of_kernel, *given, *allocated, *self._after_tensors
            )
        else:
            compiled[self._grid](*given, *allocated, *self._after_tensors_compiled)

    def _let_triton_launch(
        self, given: tuple[Tensor | None, ...], allocated: tuple[Tensor | None, ...]
    ) -> None:
        arguments = *given, *allocated, *self._after_tensors
        with _interpreter:
            compiled = self._kernel[self._grid](*arguments, num_warps=self._warps, **OPTIONS)
        # The interpreter compiles nothing.
        if isinstance(compiled, CompiledKernel) and _are_aligned(given):
            # None: no metadata for hooks, and no hooks.
            self._of_kernel = compiled.function, compiled.packed_metadata, None, None, None
            self._stream = triton.runtime.driver.active.get_current_stream
            self._compiled = compiled


def _has_hooks() -> bool:
    """Return True if somebody, such as a profiler, wants to know of launches."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    # A chain of hooks is empty unless somebody adds one; a function may stand in its place.
    return bool(getattr(enter, "calls", True) or getattr(leave, "calls", True))


def _are_aligned(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return True if 16 divides all addresses. Triton compiles other kernels for these."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses & 15
