"""The report: it runs a model once, as a call of the model does, and leaves nothing behind."""

from __future__ import annotations

import gc
import textwrap
import weakref

import pytest
import torch
import torch.nn.functional as F
from reported import CallsTheFunction, Raises, lowered_report
from support import autocast, needs_dynamo, run_forked

import lpln_autopatch
from lpln_autopatch import apply_low_precision_layernorm, exempt, low_precision_layernorm, report
from lpln_autopatch._torch_compat import TORCH_VERSION

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("active", [True, False])
def test_nothing_is_left_behind(active):
    """Functions, forwards and hooks are as before, also when the model raises."""
    with low_precision_layernorm(norms="all"):  # the first time, names for its code stay in F
        pass
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), Raises())
    if active:
        lpln_autopatch.enable()
    before = dict(vars(F)), dict(vars(torch.nn.LayerNorm))
    hooks = torch.nn.modules.module
    for run in (model, model[:1]):
        with autocast(), pytest.raises(ArithmeticError) if run is model else autocast():
            report(run, torch.randn(4, 8))
        assert (dict(vars(F)), dict(vars(torch.nn.LayerNorm))) == before
        assert not hooks._global_forward_hooks
        assert not getattr(hooks, "_global_forward_hooks_with_kwargs", None)
        assert not hooks._global_forward_pre_hooks
        assert not [module for module in model.modules() if module._forward_hooks]
    with autocast():
        assert model[0](torch.randn(4, 8)).dtype is (BF16 if active else FP32)


@pytest.mark.filterwarnings("ignore::lpln_autopatch.NoEffectWarning")
def test_no_wrapper_is_left_by_a_report_inside_a_block_that_lowers_nothing():
    """fp32 names the norms, too, and needs no wrapper of them."""
    with lpln_autopatch.low_precision_layernorm("fp32"):
        report(torch.nn.LayerNorm(8), torch.randn(4, 8))
        assert not lpln_autopatch.status().installed


def test_report_does_what_one_forward_does():
    """Gradients stay, as do RNG and buffers but for what one call of the model changes."""

    def train(run):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.LayerNorm(8)
        )
        model(torch.randn(4, 8)).sum().backward()
        with low_precision_layernorm(), autocast():
            run(model, torch.randn(4, 8))
        grads = [parameter.grad for parameter in model.parameters()]
        return *grads, *model.buffers(), torch.get_rng_state()

    called = train(lambda model, x: model(x))
    reported = train(report)
    assert len(called) == len(reported) == 8
    assert all(torch.equal(a, b) for a, b in zip(called, reported, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_and_said(training):
    """train() is not called: the model runs in the mode that it is in."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8)).train(training)
    result = lowered_report(model)
    assert result.training is training
    assert model[0].training is training


def test_gradient_mode_is_the_callers():
    """The model runs with gradients if a call here would, and without under no_grad."""
    modes = []

    class Looks(torch.nn.Module):
        def forward(self, x):
            modes.append(torch.is_grad_enabled())

    report(Looks(), 1)
    with torch.no_grad():
        report(Looks(), 1)
    assert modes == [True, False]


def test_report_inside_a_report():
    """A model that reports on a part of itself: both see the part's call."""
    seen = []

    class Reports(torch.nn.Sequential):
        def forward(self, x):
            seen.append(report(self[0], x))
            return self[0](x)

    result = lowered_report(Reports(torch.nn.LayerNorm(8)))
    assert (seen[0].lowered, seen[0].rows[0].name) == (1, "")
    assert (result.lowered, result.rows[0].name) == (2, "0")


@needs_dynamo
@pytest.mark.skipif(TORCH_VERSION < (2, 6), reason="no stance before torch 2.6; CI runs it there")
@pytest.mark.parametrize("run_before", [True, False])
def test_compiled_model_is_run_eagerly(run_before):
    """Names are those of the model that was compiled; nothing is compiled or run compiled."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
    model[1].compile(backend=backend)
    model = torch.compile(model, backend=backend)
    if run_before:
        with low_precision_layernorm(), autocast():
            model(torch.randn(4, 8))
    count = len(compilations)
    assert [(row.name, row.lowered) for row in lowered_report(model).rows] == [("0", True)]
    assert len(compilations) == count


@needs_dynamo
def test_graph_modules_are_run():
    """fx and export graphs call the function: a row, and lowered."""
    norm = torch.nn.Sequential(torch.nn.LayerNorm(8))
    traced = torch.fx.symbolic_trace(CallsTheFunction(8))
    assert lowered_report(traced).lowered == 1
    exported = torch.export.export(norm, (torch.randn(4, 8),)).module()
    assert lowered_report(exported).calls in (0, 1)  # the operator, in a graph of operators
    assert report(exported).rows == ()


def test_without_inputs_nothing_is_run():
    """The norms are listed by name and class, marked, on any device; only running tells more."""
    model = torch.nn.ModuleDict(
        {
            "stock": CallsTheFunction(8),
            "exempt": exempt(torch.nn.LayerNorm(8)),
            "group": torch.nn.GroupNorm(2, 8),
            "operated": torch.nn.LayerNorm(8),
            "linear": torch.nn.Linear(8, 8),
        }
    )
    apply_low_precision_layernorm(model["operated"])
    model.to("meta").register_forward_pre_hook(lambda *_: pytest.fail("was run"))
    result = report(model)
    assert [(row.name, row.norm, row.calls, row.reason) for row in result.rows] == [
        ("stock", "CallsTheFunction", 0, ""),
        ("exempt", "LayerNorm", 0, "exempt"),
        ("group", "GroupNorm", 0, ""),
        ("operated", "LPLayerNorm", 0, "surgery"),
    ]
    assert result.training is None
    assert str(result).splitlines() == [
        "name      norm              reason",
        "stock     CallsTheFunction",
        "exempt    LayerNorm         exempt",
        "group     GroupNorm",
        "operated  LPLayerNorm       surgery",
        "",
        "Nothing was run. Only running tells what is lowered: report(model, *inputs)",
    ]


def test_model_on_meta_is_stock():
    """A model with inputs runs on meta, which autocast does not know: stock."""
    model = torch.nn.LayerNorm(8, device="meta")
    (row,) = lowered_report(model, torch.randn(4, 8, device="meta")).rows
    assert (row.calls, row.lowered) == (1, False)


def test_report_keeps_no_model_alive():
    """Model and input die when their owner lets them go, though the report lives."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    result = lowered_report(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert result.calls == 1


DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from lpln_autopatch import report, enable
dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{sys.argv[1]}")
enable()

def model():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))

for wrapped in (
    fully_shard(torch.nn.LayerNorm(8)),
    DistributedDataParallel(model()),
    FullyShardedDataParallel(model(), device_id=torch.device("cpu")),
):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (row,) = report(wrapped, torch.randn(4, 8)).rows
        print(row.name or "-", row.lowered, wrapped(torch.randn(4, 8)).dtype)
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down
"""


@pytest.mark.skipif(TORCH_VERSION < (2, 6), reason="fully_shard is public in torch >= 2.6")
def test_sharded_and_wrapped_models(tmp_path):
    """The class that fully_shard makes, and what is inside DDP and FSDP, is lowered and said so."""
    result = run_forked("-c", DISTRIBUTED, str(tmp_path / "rendezvous"))
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["-", "True", "torch.bfloat16"],
        ["module.1", "True", "torch.bfloat16"],
        ["_fsdp_wrapped_module.1", "True", "torch.bfloat16"],
    ]


def test_report_refuses_what_is_no_module():
    """report() of a state_dict is a TypeError that says what it takes."""
    with pytest.raises(
        TypeError, match=r"takes a torch\.nn\.Module, not <class 'collections\.OrderedDict'>\.$"
    ):
        report(torch.nn.LayerNorm(8).state_dict())


def test_report_goes_on_where_a_function_is_no_python_function():
    """The other norms are reported if a function that was not asked for cannot be exchanged."""
    code = """
        import torch, lpln_autopatch
        torch.nn.functional.group_norm = torch.group_norm
        print(lpln_autopatch.report(torch.nn.LayerNorm(8), torch.randn(2, 8)).calls)
    """
    assert run_forked("-c", textwrap.dedent(code)).stdout == "1\n"


def test_enable_shows_a_sentence():
    """A notebook shows a sentence below a cell that ends with enable()."""
    assert repr(lpln_autopatch.enable("bf16")) == (
        "Lowered under autocast: layer_norm: precision amp_bf16, backend native. "
        "lpln_autopatch.disable() ends that."
    )
    with pytest.warns(lpln_autopatch.NoEffectWarning):
        assert repr(lpln_autopatch.enable("fp32")) == "Nothing is lowered."
