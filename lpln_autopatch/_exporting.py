"""torch.export: find out if the autocast of a norm is a part of the exported program."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from lpln_autopatch._torch_compat import is_exporting, run_while_compiling

# Both run for real: Dynamo takes it that it exports whenever code asks (torch 2.9).


@run_while_compiling
def is_running() -> bool:
    """Return True if torch.export is tracing."""
    return is_exporting()


@run_while_compiling
def leaves_autocast_out(by_dynamo: bool) -> bool:
    """Return True if an export is running that has not entered torch.autocast itself.

    An autocast of the caller's is not in the graph. The program will run under whatever autocast
    its new caller has, or under none, and then no other operator takes what a lowered norm gives.
    """
    if not is_running():
        return False
    if by_dynamo:
        symbolic_convert: Any = importlib.import_module("torch._dynamo.symbolic_convert")
        graph = symbolic_convert.InstructionTranslator.current_tx().output.graph
    else:
        proxy_tensor: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
        mode = proxy_tensor.get_proxy_mode()
        if mode is None:  # a draft: the model runs once before it is traced
            return True
        graph = mode.tracer.graph
    amp: Any = torch.amp
    targets = [node.target for node in graph.nodes]
    return targets.count(amp._enter_autocast) <= targets.count(amp._exit_autocast)
