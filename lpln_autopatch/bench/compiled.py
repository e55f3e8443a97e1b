"""A training step under torch.compile, counted from its graphs; no kernel is built or run.

Dynamo, AOTAutograd with its partitioner, and Inductor up to its scheduler, which fuses operators
into kernels, run on CPU tensors that hold no data, under CUDA's autocast policy.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch

from lpln_autopatch.bench import emulated, zoo
from lpln_autopatch.bench.batches import loss_of
from lpln_autopatch.bench.policy import policy


def count(entry: zoo.Entry, model: torch.nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """Compile a training step of `model`, and count its bytes, kernels and graphs.

    Returns:
        kept: bytes that the forward graphs hand to the backward graphs, each storage once, without
        parameters and casts of them; moved: bytes that Inductor's kernels, and PyTorch's operators
        between them, read and write; kernels: their number, of both kinds; graphs: the number of
        forward and backward graphs, which is more than two after a graph break.
    """
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode

    counts: dict[str, float] = dict.fromkeys(("kept", "moved", "kernels", "graphs"), 0)

    def inner(gm: Any, inputs: Any, is_backward: bool = False, **_: Any) -> Any:
        counts["graphs"] += 1
        counts["kept"] += 0 if is_backward else _kept(gm)
        runs = copy.deepcopy(gm).forward
        _schedule(gm, inputs, is_backward, counts)
        return make_boxed_func(runs)

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_fx(gm, inputs, inner_compile=inner)

    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), policy("cpu"):
        emulated.move(model, "cpu")
        batch = entry.batch_on(model, "cpu")
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(torch.compile(model, backend=backend)(**batch))
        torch.autograd.backward(loss)
        model.zero_grad()
    return counts


def _kept(gm: Any) -> int:
    """Return the bytes of the tensors that a forward graph returns besides the model's outputs."""
    metadata: Any = torch._guards.TracingContext.get().fw_metadata
    outputs = gm.graph.output_node().args[0][metadata.num_forward_returns :]
    kept: dict[int, int] = {}
    for node in outputs:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or _comes_from_an_input_alone(node):
            continue
        storage = value.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
    return sum(kept.values())


def _comes_from_an_input_alone(node: Any) -> bool:
    """Return True for a parameter, or a cast or a view of one."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return bool(node.op == "placeholder")


def _schedule(gm: Any, inputs: Any, is_backward: bool, counts: dict[str, float]) -> None:
    """Do as `compile_fx_inner` does up to the scheduler, and add its kernels to `counts`."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    compile_fx: Any = import_module("torch._inductor.compile_fx")
    mode: Any = torch._guards.detect_fake_mode(inputs)
    with V.set_fake_mode(mode), torch.no_grad():
        compile_fx.view_to_reshape(gm)
        compile_fx.fake_tensor_prop(gm, inputs)
        compile_fx.record_original_output_strides(gm)
        compile_fx._recursive_post_grad_passes(gm, is_inference=False)
    graph = GraphLowering(gm, example_inputs=inputs, is_backward=is_backward)
    with DebugContext(), V.set_graph_handler(graph), V.set_fake_mode(mode):
        graph.run(*inputs)
        graph.init_wrapper_code()
        graph._update_scheduler()
        counts["moved"] += graph.count_bytes()[0]
        counts["kernels"] += sum("Nop" not in type(n).__name__ for n in graph.scheduler.nodes)
