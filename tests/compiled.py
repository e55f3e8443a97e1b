"""Models to compile, and a switch in the middle of a compilation."""

from __future__ import annotations

import threading

import torch


class Model(torch.nn.Module):
    """A LayerNorm that gets float32, between other operations. Its parameters are not 1 and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        torch.nn.init.normal_(self.norm.weight, 1.0, 0.2)
        torch.nn.init.normal_(self.norm.bias, 0.0, 0.2)

    def forward(self, x):
        return self.norm(x.sin()) * 2


class HoldsTheFunction(torch.nn.Module):
    """A model with PyTorch's function itself in an attribute, as quantisers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.op = torch.nn.functional.layer_norm

    def forward(self, x):
        return self.op(x.sin(), (8,)) * 2


def norm_with_pauses(in_the_backend, before_the_norm=None, norm=None):
    """Return a compiled norm. Another thread runs these functions while it is first compiled."""
    pauses = {"backend": in_the_backend, "trace": before_the_norm}
    norm = norm or torch.nn.LayerNorm(8)

    @torch._dynamo.assume_constant_result
    def pause(where: str) -> None:
        function = pauses.pop(where, None)
        if function is not None:
            thread = threading.Thread(target=function)
            thread.start()
            thread.join(60)

    def backend(graph, inputs):
        pause("backend")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def call(x):
        pause("trace")
        return norm(x)

    return torch.compile(call, backend=backend)
