"""Bytes kept for backward, counted under CUDA's autocast lists: no GPU is needed."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support import UnderAutocast, autocast

from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import GRAPHS_KEEP_ROUNDED_INPUTS, HAS_RMS_NORM
from lpln_autopatch.bench.recipe import ComposerRecipe

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, FEATURES = 64, 128

# Of the operators that are called here, those that autocast on CPU leaves alone and autocast on
# CUDA runs in float32. Matrix products are in low precision on both.
FP32_ON_CUDA = ("layer_norm", "group_norm", *(["rms_norm"] if HAS_RMS_NORM else []))


@pytest.fixture
def cuda_lists() -> Iterator[None]:
    """Autocast on CPU treats the norms as autocast on CUDA does."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it overrides PyTorch's own
        for name in FP32_ON_CUDA:
            library.impl(name, _in_float32(getattr(torch.ops.aten, name).default), "AutocastCPU")
    yield
    library._destroy()


def _in_float32(operator: Any) -> Any:
    def kernel(*args: Any) -> Any:
        autocast_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):
            return operator(*(a.float() if isinstance(a, torch.Tensor) else a for a in args))

    return kernel


class Block(torch.nn.Module):
    """A residual block of a transformer, with its norm before the layers or behind the sum."""

    def __init__(self, norm: torch.nn.Module, before: bool) -> None:
        super().__init__()
        self.norm, self.before = norm, before
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 2 * FEATURES),
            torch.nn.GELU(),
            torch.nn.Linear(2 * FEATURES, FEATURES),
        )

    def forward(self, x):
        return x + self.layers(self.norm(x)) if self.before else self.norm(x + self.layers(x))


NORMS = {
    "layer_norm": torch.nn.LayerNorm,
    "group_norm": functools.partial(torch.nn.GroupNorm, 4),
    "rms_norm": getattr(torch.nn, "RMSNorm", None),  # until torch 2.4
}


def model(norm: Callable[[int], torch.nn.Module], before: bool) -> torch.nn.Module:
    """Two blocks, a norm, and a head."""
    torch.manual_seed(0)
    blocks = [Block(norm(FEATURES), before) for _ in range(2)]
    return torch.nn.Sequential(*blocks, norm(FEATURES), torch.nn.Linear(FEATURES, 8))


@contextlib.contextmanager
def nothing_compiled_to_machine_code() -> Iterator[None]:
    """Inductor generates its code, and runs its graph operator by operator."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    def compile_to_module(self: Any) -> Any:
        self.codegen()

        class Module:
            __file__ = key = __path__ = ""

            @staticmethod
            def call(args: list[Any]) -> list[Any]:
                given = [*args]
                args.clear()
                return list(torch.fx.Interpreter(self.module).run(*given))

        return Module

    with (
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
        # What is compiled here is for CUDA's lists, which no cache knows of.
        config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


def compiled_training_step(
    model: torch.nn.Module, input_dtype: torch.dtype, lower: bool
) -> tuple[int, int]:
    """The bytes that a compiled step of `model` keeps for backward, and its kernels."""
    from torch._inductor import metrics

    torch._dynamo.reset()
    metrics.reset()
    x = torch.randn(ROWS, FEATURES).to(input_dtype).requires_grad_()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    compiled = torch.compile(model, fullgraph=True)
    block = low_precision_layernorm(norms="all") if lower else contextlib.nullcontext()
    with block, nothing_compiled_to_machine_code():
        with autocast():
            y = compiled(x)
        y.float().square().sum().backward()
        kernels = metrics.generated_kernel_count
        with autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            compiled(x)
    return sum(kept.values()), kernels


needs_rounding = pytest.mark.skipif(
    not GRAPHS_KEEP_ROUNDED_INPUTS,
    reason="before torch 2.13 Inductor undoes the rounding; CI runs this on later ones",
)


@needs_rounding
@pytest.mark.parametrize("input_dtype", [FP32, BF16])
@pytest.mark.parametrize("before", [True, False])
def test_compiled_code_keeps_no_more_than_composers(cuda_lists, before, input_dtype):
    """Compiled code keeps no more than stock and the recipe, in no more kernels than the recipe."""
    layer_norm = torch.nn.LayerNorm
    ours, kernels = compiled_training_step(model(layer_norm, before), input_dtype, lower=True)
    stock, _ = compiled_training_step(model(layer_norm, before), input_dtype, lower=False)
    theirs = compiled_training_step(model(ComposerRecipe, before), input_dtype, lower=False)
    assert ours <= 1.005 * theirs[0]
    assert ours <= 1.005 * stock
    assert kernels <= theirs[1]


@needs_rounding
@pytest.mark.parametrize("name", NORMS)
def test_compiled_code_keeps_a_rounded_residual(cuda_lists, name):
    """A float32 residual before a norm is kept in two bytes a value, where stock keeps four."""
    ours, _ = compiled_training_step(model(NORMS[name], True), FP32, lower=True)
    stock, _ = compiled_training_step(model(NORMS[name], True), FP32, lower=False)
    assert ours < 0.97 * stock


@needs_rounding
@pytest.mark.parametrize("input_dtype", [BF16, FP16])
def test_compiled_code_rounds_no_low_precision_input(input_dtype):
    """A bfloat16 x under autocast to float16, and the reverse, is rounded once, in the output."""
    norm = torch.nn.LayerNorm(FEATURES)
    other = FP16 if input_dtype is BF16 else BF16
    x = (torch.randn(ROWS, FEATURES) * 3 + 5).to(input_dtype)
    with low_precision_layernorm(), autocast(other):
        y = torch.compile(norm, fullgraph=True, backend="aot_eager")(x)
    with low_precision_layernorm():
        model = UnderAutocast(norm, other)
        exported = torch.export.export(model, (x.float(),)).module()(x.float())
    expected = norm(x.float()).to(other)
    assert torch.equal(y, expected)
    assert torch.equal(exported, expected)
