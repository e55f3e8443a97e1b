"""What a training step does, counted: operators, bytes moved, bytes kept, the peak."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lpln_autopatch.bench.policy import Policy

NORMS = ("native_layer_norm", "native_group_norm", "rms_norm")
CASTS = ("_to_copy",)
BANDWIDTH, RATE = 2.0e12, 312e12


@dataclasses.dataclass
class Counts:
    """The counts of one training step.

    Attributes:
        operators: Those that read or write memory: no views, no questions about a tensor.
        moved: Bytes that they read and write, each operand once.
        norms: Bytes of those that the norms move.
        casts: Bytes of those that casts move.
        kept: Bytes that autograd keeps from forward to backward: no parameters, no cached casts
            of them, each storage once.
        flops: Of its matrix products, convolutions and attention.
        least_ms: A bound, no measurement: no A100 takes less, whose memory moves 2.0 TB/s and
            whose units do 312 TFLOP/s. The sum over operators of what either needs for it.
        peak: The most bytes that were alive at once, parameters and their gradients included.
        norm_calls: Norms run in forward.
        lowered_calls: Those of them whose output has the autocast dtype.
    """

    operators: int = 0
    moved: int = 0
    norms: int = 0
    casts: int = 0
    kept: int = 0
    flops: int = 0
    least_ms: float = 0.0
    peak: int = 0
    norm_calls: int = 0
    lowered_calls: int = 0


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operator that runs inside, into `counts`."""

    def __init__(self, alive: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._bytes = 0
        for tensor in alive:
            self._watch(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = _tensors(result)
        for tensor in outputs:
            self._watch(tensor)
        if _is_a_kernel(func, outputs):
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            self._count(func, _tensors((args, kwargs)), outputs, flops)
        return result

    def _count(
        self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], flops: int
    ) -> None:
        counts, name = self.counts, func._schema.name.split("::")[1]
        size = sum(map(_bytes, {id(t): t for t in inputs}.values()))
        size += sum(map(_bytes, outputs))
        counts.operators += 1
        counts.flops += flops
        counts.least_ms += 1e3 * max(size / BANDWIDTH, flops / RATE)
        counts.moved += size
        if name.startswith(NORMS):
            counts.norms += size
            if not name.endswith("_backward"):
                counts.norm_calls += 1
                counts.lowered_calls += outputs[0].dtype is not torch.float32
        counts.casts += size * (name in CASTS)

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self._bytes -= self._alive.pop(key)[1]

        self._alive[key] = (weakref.ref(storage, gone), storage.nbytes())
        self._bytes += storage.nbytes()
        self.counts.peak = max(self.counts.peak, self._bytes)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    """What a kernel that reads all of `tensor` reads: an expanded dimension once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


# They give a new tensor and touch no memory: what fills it is counted.
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def _is_a_kernel(func: Any, outputs: list[torch.Tensor]) -> bool:
    if not outputs or func.namespace == "prim":
        return False
    if func._schema.name.split("::")[1] in _ALLOCATES | {"_unsafe_view"}:
        return False
    returns = [r.alias_info for r in func._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in returns)


def count(
    forward: Callable[[], torch.Tensor], model: torch.nn.Module, policy: Policy, batch: Any
) -> Counts:
    """Run a training step, `forward` and the backward of the loss that it gives, and count it."""
    state = [*model.parameters(), *model.buffers()]
    parameters = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and not policy.is_cast_of_weight(tensor):
            kept[storage._cdata] = storage.nbytes()
        return tensor

    counter = Counter([*state, *_tensors(batch)])
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward()
        counter.counts.kept = sum(kept.values())
        torch.autograd.backward(loss)
    model.zero_grad()
    return counter.counts
