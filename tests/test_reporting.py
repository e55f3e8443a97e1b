"""report(model, *inputs): its rows, each beside what is true of the call."""

from __future__ import annotations

import contextlib
import functools
import gc
import textwrap
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from importlib_metadata import EntryPoint
from support import autocast, needs_dynamo, run_forked

import lpln_autopatch
from lpln_autopatch import (
    apply_low_precision_layernorm,
    backends,
    exempt,
    low_precision_layernorm,
    report,
)
from lpln_autopatch._recorder import Row
from lpln_autopatch._torch_compat import HAS_RMS_NORM, TORCH_VERSION

BF16, FP32 = torch.bfloat16, torch.float32


needs_always_called_hooks = pytest.mark.skipif(
    TORCH_VERSION < (2, 0), reason="no hook runs always before torch 2.0; CI runs it on later ones"
)


class CallsTheFunction(torch.nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ByHand(torch.nn.Module):
    """Stands for a norm of its own that is none of PyTorch's."""

    def forward(self, x):
        return x / x.float().abs().mean(-1, keepdim=True)


class ByHandNorm(ByHand):
    pass


class Raises(torch.nn.Module):
    def forward(self, x):
        raise ArithmeticError


def lowered_report(model, x=None, **options):
    """The report under bf16 autocast on the CPU."""
    with low_precision_layernorm(**options), autocast():
        return report(model, torch.randn(4, 8) if x is None else x)


def reasons(model, x=None, **options) -> list[str]:
    return [row.reason for row in lowered_report(model, x, **options).rows]


def test_rows_are_the_calls_in_their_order():
    """A row has the innermost module's name and its calls; a shared module has the first name."""
    shared = torch.nn.LayerNorm(8)
    inner = torch.nn.Sequential(shared, CallsTheFunction(8))
    result = lowered_report(torch.nn.Sequential(shared, inner, shared))
    assert result.rows == (
        Row("0", "layer_norm", 1, FP32, BF16, True, ""),
        Row("0", "layer_norm", 2, BF16, BF16, True, ""),
        Row("1.1", "layer_norm", 1, BF16, BF16, True, ""),
    )
    assert (result.calls, result.lowered) == (4, 4)


def test_report_prints_as_a_table():
    """A line for each row, what it did about train(), and the count."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), ByHandNorm(), exempt(torch.nn.LayerNorm(8)))
    assert str(lowered_report(model.eval())).splitlines() == [
        "name  norm        calls  input     output    lowered  reason",
        "0     layer_norm  1      float32   bfloat16  yes",
        "1     ByHandNorm  1      bfloat16  float32   no       hand-written, and not recognised: "
        "its values or gradients are not those of RMSNorm or LayerNorm",
        "2     layer_norm  1      float32   float32   no       exempt",
        "",
        "The model ran in evaluation mode, and is left in it.",
        "1 of 3 norm calls are lowered",
    ]


def test_model_itself_has_a_name_in_the_table():
    """A bare norm is a row too: its qualified name is empty, and the table says what it is."""
    assert str(lowered_report(torch.nn.LayerNorm(8))).splitlines()[1].startswith("(the model)  lay")


def test_reasons_are_those_of_the_decision():
    """The report names the rule that has left a call stock, for every rule."""
    norm, x = torch.nn.LayerNorm(8), torch.randn(4, 8)
    assert reasons(norm.double(), x.double()) == ["float64"]
    norm.float()
    assert reasons(torch.nn.GroupNorm(2, 8)) == ["not among the norms"]
    with low_precision_layernorm():
        assert [row.reason for row in report(norm, x).rows] == ["no autocast"]
    with autocast():
        assert [row.reason for row in report(norm, x).rows] == ["no precision is active"]
    with pytest.warns(lpln_autopatch.NoEffectWarning):
        (reason,) = reasons(norm, precision="amp_fp16")
    assert reason == "precision amp_fp16, autocast to torch.bfloat16"


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(CallsTheFunction(8), marks=needs_always_called_hooks),
        torch.nn.Sequential(torch.nn.LayerNorm(8)),
    ],
)
def test_exempt_covers_what_is_beneath(block):
    """A call inside an exempt module is stock, for that reason, whoever makes it."""
    result = lowered_report(exempt(block))
    assert (result.calls, result.lowered, result.rows[0].reason) == (1, 0, "exempt")
    assert result.rows[0].output_dtype is FP32


def test_other_norms_are_lowered_on_request():
    """Each is named by its function."""
    norms = [torch.nn.GroupNorm(2, 8), *([torch.nn.RMSNorm(8)] if HAS_RMS_NORM else [])]
    result = lowered_report(torch.nn.Sequential(*norms), norms="all")
    names = ["group_norm", "rms_norm"][: len(norms)]
    assert [(row.norm, row.lowered) for row in result.rows] == [(name, True) for name in names]


def test_norm_that_was_not_called_is_a_row():
    """A norm that was not called is a last row without calls and dtypes, and counts for nothing."""

    class Half(torch.nn.ModuleList):
        def forward(self, x):
            return self[1](x)

    result = lowered_report(Half([ByHandNorm(), torch.nn.LayerNorm(8)]))
    assert result.rows == (
        Row("1", "layer_norm", 1, FP32, BF16, True, ""),
        Row("0", "ByHandNorm", 0, None, None, False, "not called"),
    )
    assert (result.calls, result.lowered) == (1, 1)


def test_function_called_outside_every_submodule_is_the_models():
    """nanoGPT's way, a bare F.layer_norm in the model's own forward, has the model's name."""

    class Model(torch.nn.Module):
        def forward(self, x):
            return F.layer_norm(input=x, normalized_shape=[8])

    assert lowered_report(Model()).rows == (Row("", "layer_norm", 1, FP32, BF16, True, ""),)


def test_surgery_is_named():
    """A module under surgery lowers by itself, without a precision in force."""
    model = torch.nn.Sequential(exempt(torch.nn.LayerNorm(8)), torch.nn.LayerNorm(8))
    apply_low_precision_layernorm(model)
    with autocast():
        result = report(model, torch.randn(4, 8))
    assert [(row.lowered, row.reason) for row in result.rows] == [
        (False, "exempt"),
        (True, "surgery"),
    ]


def casts(beneath):
    def forward(self, x):
        return beneath(self, x).half()

    return forward


def lowers(beneath):
    def forward(self, x):
        return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias).bfloat16()

    return forward


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="a device is a context from torch 2.0 on")
def test_surgery_is_named_inside_a_function_mode():
    """A mode calls the forward again: it is one call, lowered by surgery."""
    model = torch.nn.LayerNorm(8)
    lpln_autopatch.apply_low_precision_layernorm(model)
    with autocast(), torch.device("cpu"):
        (row,) = report(model, torch.randn(4, 8)).rows
    assert (row.calls, row.lowered, row.reason) == (1, True, "surgery")


def test_other_patchers_forward_beneath_is_seen(monkeypatch):
    """Ours rounds what a patcher beneath it gives: lowered. Without ours, the patcher did it."""
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", casts(torch.nn.LayerNorm.forward))
    (row,) = lowered_report(torch.nn.LayerNorm(8)).rows
    assert (row.lowered, row.output_dtype, row.calls) == (True, BF16, 1)


def test_other_patcher_that_lowers_is_named(monkeypatch):
    """A forward that gives the autocast dtype by itself has lowered, not we."""
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lowers(None))
    with autocast():
        (row,) = report(torch.nn.LayerNorm(8), torch.randn(4, 8)).rows
    assert (row.lowered, row.reason) == (True, "another patcher")


@pytest.mark.parametrize("active", [True, False])
def test_nothing_is_left_behind(active):
    """Functions, forwards and hooks are what they were, also when the model raises."""
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


@needs_always_called_hooks
@pytest.mark.filterwarnings("error")
def test_model_may_catch_what_a_part_of_it_raises():
    """The calls after that have the names of their own modules."""

    class Catches(torch.nn.Sequential):
        def forward(self, x):
            with contextlib.suppress(ArithmeticError):
                self[0](x)
            return self[1](F.layer_norm(x, [8]))

    rows = lowered_report(Catches(Raises(), torch.nn.LayerNorm(8))).rows
    assert [row.name for row in rows] == ["", "1"]


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


def test_other_threads_calls_are_not_seen():
    """Another thread's calls while the model runs are no rows."""

    class StartsAThread(torch.nn.LayerNorm):
        def forward(self, x):
            thread = threading.Thread(target=lambda: torch.nn.LayerNorm(8)(x))
            thread.start()
            thread.join()
            return super().forward(x)

    assert lowered_report(StartsAThread(8)).calls == 1


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


def test_block_inside_the_model_is_obeyed():
    """The precision in force at the call decides, whoever put it in force, and when."""

    class OpensABlock(torch.nn.LayerNorm):
        def forward(self, x):
            with low_precision_layernorm():
                return super().forward(x)

    with autocast():
        assert report(OpensABlock(8), torch.randn(4, 8)).lowered == 1
        assert torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype is FP32


@pytest.mark.skipif(TORCH_VERSION < (2, 0), reason="function modes are newer; CI runs it there")
def test_call_under_a_function_mode_is_one_call():
    """A function mode (torch.device's) calls the function again: that is the same call."""
    with torch.device("cpu"):
        result = lowered_report(CallsTheFunction(8))
    assert (result.calls, result.lowered) == (1, 1)


def calls_the_function(x, normalized_shape, weight, bias, eps, dtype):
    """A backend of another package."""
    return F.layer_norm(x, normalized_shape, weight, bias, eps).to(dtype)


def test_what_a_backend_calls_is_no_call_of_the_models(monkeypatch):
    """A backend of another package may call the function itself: one row, and lowered."""
    ours = EntryPoint("mine", f"{__name__}:calls_the_function", backends.GROUP)
    monkeypatch.setattr(backends, "entry_points", lambda group, name: [ours])
    result = lowered_report(torch.nn.LayerNorm(8), backend="mine")
    assert result.rows == (Row("", "layer_norm", 1, FP32, BF16, True, ""),)


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


@pytest.mark.parametrize("name", ["EnormousHead", "NormPenaltyLoss", "Normalize", "NormalMLP"])
def test_word_that_is_no_norm_is_no_row(name):
    """ "Norm" inside another word, and a loss, name no norm."""
    assert report(type(name, (ByHand,), {})()).rows == ()
    assert lowered_report(type(name, (ByHand,), {})()).rows == ()


@pytest.mark.parametrize("name", ["T5LayerNorm", "RmsNorm2d", "Layernorm", "my_norm", "NormAct"])
def test_word_that_is_a_norm_is_a_row(name):
    """A class is a norm by its name in CamelCase, with underscores, and by the usual names."""
    module = type(name, (ByHand,), {})()
    assert [row.norm for row in report(module).rows] == [name]
    assert [(row.norm, row.lowered) for row in lowered_report(module).rows] == [(name, False)]


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_norm_that_autocast_leaves_alone_is_no_row(name):
    """BatchNorm and InstanceNorm are on no list of autocast's: there is nothing to lower."""
    module = getattr(torch.nn, name)(8)
    assert lowered_report(module, torch.randn(2, 8, 4)).rows == ()


def test_accelerated_forward_of_an_instance_is_run():
    """A forward on the instance runs, as in a call: what it calls is seen."""
    module = torch.nn.LayerNorm(8)
    module.forward = functools.partial(torch.nn.LayerNorm.forward, module)
    assert lowered_report(module).lowered == 1


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


def test_report_inside_a_report_hides_no_call():
    """A model that reports on a part of itself: both see the part's call."""

    class Reports(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, x):
            inner.append(report(self.norm, x))
            return x

    inner = []
    outer = report(Reports(), torch.randn(4, 8))
    assert (outer.calls, inner[0].calls) == (1, 1)


def test_report_goes_on_where_a_function_is_no_python_function():
    """The other norms are reported if a function that was not asked for cannot be exchanged."""
    code = """
        import torch, lpln_autopatch
        torch.nn.functional.group_norm = torch.group_norm
        print(lpln_autopatch.report(torch.nn.LayerNorm(8), torch.randn(2, 8)).calls)
    """
    assert run_forked("-c", textwrap.dedent(code)).stdout == "1\n"


class Fails(torch.nn.Module):
    """A model whose head takes only float32, which a stock norm gives it."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.LayerNorm(8))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        f = self.blocks(x)
        with autocast(enabled=False):
            return self.head(f)


def test_model_that_raises_is_noted_on_its_own_exception():
    """The note has the norm calls so far, the last norm that returned, and the module to exempt."""
    model = Fails()
    with pytest.raises(RuntimeError) as raised:
        lowered_report(model)
    (note,) = raised.value.__notes__
    assert note.splitlines() == [
        "lpln_autopatch: the norm calls until then:",
        "name      norm        calls  input     output    lowered  reason",
        "blocks.0  layer_norm  1      float32   bfloat16  yes",
        "blocks.1  layer_norm  1      bfloat16  bfloat16  yes",
        "2 of 2 norm calls are lowered. The last norm that returned is blocks.1, in bfloat16. "
        "If the failed code takes only float32, keep that norm stock: "
        "exempt(model.get_submodule('blocks.1')), or LPLN_EXEMPT=blocks.1.",
    ]
    # On the CPU a stock norm gives bfloat16 for bfloat16.
    exempt(model.blocks)
    assert lowered_report(model).calls == 2


def test_note_advises_what_it_knows():
    """The note has no advice where no norm, or a stock norm, has returned."""
    with pytest.raises(ArithmeticError) as raised:
        lowered_report(Raises())
    expected = "lpln_autopatch: no norm had returned when this was raised."
    assert raised.value.__notes__ == [expected]
    with pytest.raises(ArithmeticError) as raised:
        lowered_report(torch.nn.Sequential(exempt(torch.nn.LayerNorm(8)), Raises()))
    assert raised.value.__notes__[0].endswith("The last norm that returned is 0, in float32.")

    class Norm(torch.nn.LayerNorm):
        def forward(self, x):
            raise ArithmeticError(super().forward(x).dtype)

    with pytest.raises(ArithmeticError) as raised:
        lowered_report(Norm(8))
    assert raised.value.__notes__[0].endswith("keep that norm stock: exempt(model).")


def test_notebook_shows_tables():
    """A cell for each value, escaped; what stands below the table too."""
    model = torch.nn.Sequential(exempt(torch.nn.LayerNorm(8)), torch.nn.LayerNorm(8))
    shown = lowered_report(model)._repr_html_()
    assert shown.startswith("<table>\n<tr><th ")
    for cell in ("name", "layer_norm", "bfloat16", "yes", "exempt"):
        assert f">{cell}<" in shown
    assert shown.endswith("<div>1 of 2 norm calls are lowered</div>")
    assert "<div>Nothing was run." in report(model)._repr_html_()
    with low_precision_layernorm():
        shown = lpln_autopatch.status()._repr_html_()
    assert ">precision</td>" in shown
    assert ">amp</td>" in shown


def test_enable_shows_a_sentence():
    """A notebook shows a sentence below a cell that ends with enable()."""
    assert repr(lpln_autopatch.enable("bf16")) == (
        "Lowered under autocast: layer_norm: precision amp_bf16, backend native. "
        "lpln_autopatch.disable() ends that."
    )
    with pytest.warns(lpln_autopatch.NoEffectWarning):
        assert repr(lpln_autopatch.enable("fp32")) == "Nothing is lowered."
