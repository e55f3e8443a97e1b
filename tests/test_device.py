"""A default device, which crosses everything that is lowered: calls run as they do without one."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from support import autocast, needs_dynamo
from torch.utils.checkpoint import checkpoint

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import HAS_RMS_NORM, TORCH_VERSION

BF16, FP32 = torch.bfloat16, torch.float32
nn = torch.nn

pytestmark = pytest.mark.skipif(
    TORCH_VERSION < (2, 0), reason="torch < 2.0 has no default device; CI runs this on later ones"
)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


# Every tensor that a backend makes without naming its device would be on meta, and spoil the rest.
devices = pytest.mark.parametrize(
    "device", [torch.device, default_device], ids=["torch.device", "set_default_device"]
)


class Model(nn.Module):
    """Each norm of torch's, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.GroupNorm(2, 8)])
        if HAS_RMS_NORM:
            self.norms.append(nn.RMSNorm(8))

    def forward(self, x):
        return torch.stack([*(norm(x) for norm in self.norms), F.layer_norm(x, (8,))])


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def checkpointed(model):
    return lambda x: checkpoint(model, x, use_reentrant=False)


def by_surgery(model):
    lpln.apply_low_precision_layernorm(model)
    lpln.disable()
    return model


WAYS = {
    "eager": lambda model: model,
    "compiled": pytest.param(compiled, marks=needs_dynamo),
    "checkpointed": checkpointed,
    "surgery": by_surgery,
}


def y_and_gradient(run, x):
    with autocast():
        y = run(x)
    return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]


@devices
@pytest.mark.parametrize("backend", ["native", "lean"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_lowered_elsewhere_is_lowered(way, backend, device):
    """The same bits and gradients, in the block and behind it."""
    x = torch.randn(4, 8, requires_grad=True)
    lpln.enable(norms="all", backend=backend)
    run = way(Model())
    expected = y_and_gradient(run, x)
    with device("meta"):
        got = y_and_gradient(run, x)
    for a, b, c in zip(expected, got, y_and_gradient(run, x), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert expected[0].dtype is (FP32 if way is by_surgery else BF16)


@devices
def test_surgery_lowers(device):
    """A module that lowers by itself, where nothing else is active."""
    norm, x = lpln.LPLayerNorm(8), torch.randn(4, 8)
    with device("meta"), autocast():
        assert norm(x).dtype is BF16


@devices
def test_exempt_modules_stay_stock(device):
    """Exempt modules stay stock by their hooks, and by the forwards of torch's norms."""
    model, x = Model(), torch.randn(4, 8)
    for norm in model.norms:
        lpln.exempt(norm)
    with low_precision_layernorm(norms="all"), device("meta"), autocast():
        for norm in model.norms:
            assert norm(x).dtype is FP32
            assert norm.forward(x).dtype is FP32


@devices
def test_report_counts_each_call_once(device):
    """A function mode calls the function anew."""
    model, x = Model(), torch.randn(4, 8)
    with low_precision_layernorm(norms="all"), device("meta"), autocast():
        report = lpln.report(model, x)
    assert report.lowered == report.calls == len(model.norms) + 1
