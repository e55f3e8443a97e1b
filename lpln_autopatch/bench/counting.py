"""Counts of a training step: operators, bytes moved, bytes kept, the peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lpln_autopatch.bench.policy import Policy

NORMS = (
    "aten::native_layer_norm",
    "aten::native_group_norm",
    "emulated::rms_norm",
    "emulated::norm_",
)
NOT_A_CALL = ("_backward", "_reduce")  # suffixes of a norm's other kernels
COUNTED = "operators moved norms casts kept flops least_ms peak norm_calls lowered_calls"
CAST = "_to_copy"
BANDWIDTH, RATE = 2.0e12, 312e12  # of an A100's memory, in bytes, and of its units, in FLOP


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operator that runs inside, into `counts`."""

    def __init__(self, alive: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, float] = dict.fromkeys(COUNTED.split(), 0)
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
        is_norm = func._schema.name.startswith(NORMS)
        is_norm_call = is_norm and not name.endswith(NOT_A_CALL)
        counts["operators"] += 1
        counts["flops"] += flops
        counts["least_ms"] += 1e3 * max(size / BANDWIDTH, flops / RATE)
        counts["moved"] += size
        counts["norms"] += size * is_norm
        counts["casts"] += size * (name == CAST)
        counts["norm_calls"] += is_norm_call
        counts["lowered_calls"] += is_norm_call and outputs[0].dtype is not torch.float32

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self._bytes -= self._alive.pop(key)[1]

        self._alive[key] = (weakref.ref(storage, gone), storage.nbytes())
        self._bytes += storage.nbytes()
        self.counts["peak"] = max(self.counts["peak"], self._bytes)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes that a kernel reads of `tensor`: an expanded dimension counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


# They return a new tensor without touching its memory: the operator that fills it is counted.
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
) -> dict[str, float]:
    """Run a training step, `forward` and the backward of the loss that it returns, and count it.

    Returns:
        operators: operators that read or write memory; views are none. flops: FLOPs of matrix
        products, convolutions and attention. moved: bytes that operators read and write, each
        operand of an operator once. norms, casts: the shares of norms and casts in moved. kept:
        bytes that autograd keeps from forward to backward, each storage once, without parameters
        and cached casts of them. peak: the most bytes that were alive at once, with parameters and
        their gradients. norm_calls: norms that ran in forward. lowered_calls: norms that ran and
        returned the autocast dtype. least_ms: a bound, no measurement: the sum over operators of
        the time that an A100 needs at least for their bytes or FLOPs.
    """
    state = [*model.parameters(), *model.buffers()]
    parameters = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
    kept: dict[int, weakref.ref[Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and not policy.is_cast_of_weight(tensor):
            kept[storage._cdata] = weakref.ref(storage)
        return tensor.detach()  # An output would keep its own graph alive.

    counter = Counter([*state, *_tensors(batch)])
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward()
        # What forward itself has dropped again is not kept.
        storages = (storage() for storage in kept.values())
        counter.counts["kept"] = sum(s.nbytes() for s in storages if s is not None)
        torch.autograd.backward(loss)
    model.zero_grad()
    return counter.counts
