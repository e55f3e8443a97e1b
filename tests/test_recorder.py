"""Rows of a report, each beside the truth about its calls."""

from __future__ import annotations

import contextlib
import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from importlib_metadata import EntryPoint
from reported import ByHand, ByHandNorm, CallsTheFunction, Raises, lowered_report
from support import autocast

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


def test_other_threads_calls_are_not_seen():
    """Another thread's calls while the model runs are no rows."""

    class StartsAThread(torch.nn.LayerNorm):
        def forward(self, x):
            thread = threading.Thread(target=lambda: torch.nn.LayerNorm(8)(x))
            thread.start()
            thread.join()
            return super().forward(x)

    assert lowered_report(StartsAThread(8)).calls == 1


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


def test_norm_that_returns_no_tensor_is_stock():
    """A module that is a norm by its name and returns a dict is not lowered, by nobody."""

    class DictNorm(torch.nn.Module):
        def forward(self, x):
            return {"y": x}

    (row,) = report(torch.nn.Sequential(DictNorm()), torch.randn(4, 8)).rows
    assert not row.lowered
