"""The host's time of a small call: kernels are compiled for a GPU, and launched on none.

`bench call` runs it in a process of its own, where a stand-in is the driver of Triton. The time
holds all that this package and Triton do in Python for a launch, and neither the launch nor the
kernel.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch import _forward
from lpln_autopatch._torch_compat import autocast_disabled
from lpln_autopatch.bench import timing
from lpln_autopatch.bench.call import BACKENDS, PASSES, STOCK, Layer
from lpln_autopatch.bench.contenders import Contender

SHAPE = (8, 64)


class OnAGpu(torch.nn.LayerNorm):
    """Does on CPU tensors what `native` does on a GPU: it decides, and runs the same operators."""

    def forward(self, input: Tensor) -> Tensor:
        dtype, _ = _forward.decide_and_count(_forward.active, "layer_norm", input, self.weight)
        assert dtype is not None
        x, weight, bias = (t.to(dtype=dtype) for t in (input, self.weight, self.bias))
        with autocast_disabled():
            return torch.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


NATIVE_ON_A_GPU = Contender("native on a GPU", OnAGpu, backend="native")


class Driver:
    """Triton's driver of a GPU that is not there: compute capability 9.0, and it takes CPU tensors.

    Attributes:
        launched: If it is a list, the metadata and the launcher's arguments of each launch.
    """

    # No GPU has this number: Triton finds no kernel of another driver.
    number = 1000

    def __init__(self) -> None:
        self.launched: list[tuple[Any, tuple[Any, ...]]] | None = None
        self.utils, self.launcher_cls = self, self._launcher

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        from triton.compiler import CompiledKernel

        # module, function, registers and spills; until Triton 3.5: no threads
        threads = "n_max_threads" in inspect.getsource(CompiledKernel._init_handles)
        return (1, 1, 32, 0, *[1024] * threads)

    def unload_module(self, module: int) -> None:
        pass

    def _launcher(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            if self.launched is not None:
                self.launched.append((metadata, arguments))

        return launch


def pretend() -> Driver:
    """Have Triton take the driver, before anything has been launched."""
    from triton.runtime import driver

    driver.set_active(ours := Driver())
    return ours


def main() -> None:
    """Print the rows as JSON."""
    pretend()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, rounds = torch.device("cpu"), int(sys.argv[1])
    no_progress: Any = types.SimpleNamespace(update=bool)
    ours = [Contender(f"lowered ({name})", backend=name) for name in BACKENDS]
    contenders = [STOCK, NATIVE_ON_A_GPU, *ours]
    rows: list[dict[str, Any]] = []
    for x in (torch.float32, torch.bfloat16):
        layer = Layer(SHAPE, x, torch.bfloat16, device)
        for backward, name in PASSES.items():
            entries = [layer.entry(contender, backward) for contender in contenders]
            timing.interleave(entries, device, rounds, no_progress)
            for entry in entries:
                others = [other for other in entries[:2] if other is not entry]
                ratios = {f"/ {other.name}": vars(entry.over(other)) for other in others}
                case = {"pass": f"{name}, kernels stubbed out", **layer.case}
                rows.append({"case": case, "contender": entry.name, "figures": ratios})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
