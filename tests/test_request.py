"""Requests: names of precisions, backends and norms are checked before anything changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import output_dtype

import lpln_autopatch as lpln
from lpln_autopatch import NoEffectWarning, low_precision_layernorm
from lpln_autopatch._request import norm_names

BF16 = torch.bfloat16


@pytest.mark.parametrize("arguments", [("bf61",), ("amp", "cuda"), ("off",), (None,)])
@pytest.mark.parametrize("ask", [lpln.enable, low_precision_layernorm])
def test_refused_request_changes_nothing(layer_norm, ask, arguments):
    """A bad precision or backend is a ValueError at the call, and the state stays."""
    lpln.enable("bf16")
    before = lpln.status()
    with pytest.raises(ValueError, match="Valid: "):
        ask(*arguments)
    assert lpln.status() == before
    assert output_dtype(layer_norm) is BF16


@pytest.mark.parametrize("name", ["fp32", "fp16", "amp_fp8"])
def test_precision_that_never_engages_warns(name):
    """Composer's other precisions are accepted with a NoEffectWarning, here at the caller."""
    with pytest.warns(NoEffectWarning, match=name) as caught:
        lpln.enable(name)
    assert caught[0].filename == __file__
    lpln.disable()
    with pytest.warns(NoEffectWarning, match=name) as caught, low_precision_layernorm(name):
        pass
    assert caught[0].filename == __file__


def test_inner_block_that_switches_off_does_not_warn():
    """fp32 inside an active block or base is a switch, not a mistake."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with low_precision_layernorm("amp"), low_precision_layernorm("fp32"):
            pass
        lpln.enable("amp")
        with low_precision_layernorm("fp32"):
            pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("layer_norm", ("layer_norm",)),
        (" Group_Norm , layer_norm", ("layer_norm", "group_norm")),
        (["group_norm", "group_norm"], ("group_norm",)),
        (("all",), norm_names()),
        ("all", norm_names()),
    ],
)
def test_norms_are_named(value, expected):
    """A name, several in a string or a list, or all; status() shows them."""
    lpln.enable(norms=value)
    assert lpln.status().norms == expected
    assert f"norms        {', '.join(expected)}" in str(lpln.status())


@pytest.mark.parametrize("value", ["layernorm", ["layer_norm", "batch_norm"], "", [], 3])
def test_wrong_norms_are_refused(value):
    """A ValueError with the value and the valid names, and nothing has changed."""
    lpln.enable("bf16")
    before = lpln.status()
    for ask in (lpln.enable, low_precision_layernorm):
        with pytest.raises(ValueError, match="norms=") as error:
            ask(norms=value)
        assert repr(value) in str(error.value)
        assert all(name in str(error.value) for name in (*norm_names(), "all"))
    assert lpln.status() == before


def test_variable_names_the_norms_where_no_argument_does(monkeypatch):
    """LPLN_NORMS is the default of the argument, as LPLN_BACKEND is of backend."""
    monkeypatch.setenv("LPLN_NORMS", "layer_norm,group_norm")
    lpln.enable()
    assert lpln.status().norms == ("layer_norm", "group_norm")
    lpln.enable(norms="layer_norm")
    assert lpln.status().norms == ("layer_norm",)
    monkeypatch.setenv("LPLN_NORMS", "batchnorm")
    with pytest.raises(ValueError, match=r"LPLN_NORMS='batchnorm'.*group_norm"):
        lpln.enable()
