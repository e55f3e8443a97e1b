"""NVIDIA apex: the usable installations, the calls of its kernels, and calls left to native."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from support import autocast

import lpln_autopatch as lpln
from lpln_autopatch import (
    Precision,
    _torch_compat,
    backends,
)
from lpln_autopatch.backends import apex, native

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

NVIDIA = """
CALLS = []
def record(name, tensors, shape, eps):
    CALLS.append((name, [t.dtype for t in tensors], [tuple(t.shape) for t in tensors], shape, eps))
    from lpln_autopatch._torch_compat import autocast_dtype
    assert autocast_dtype("cpu") is None
    return tensors[0] * 0 + 7
def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return record("affine" + "_lean" * memory_efficient, [input, weight, bias], normalized_shape, eps)
def fused_layer_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
    return record("plain" + "_lean" * memory_efficient, [input], normalized_shape, eps)
"""  # noqa: E501


@pytest.fixture
def install_apex(tmp_path, monkeypatch):
    """Puts an apex on sys.path: "nvidia", "old", "python only", "unrelated" or "clone"."""

    def install(kind: str) -> None:
        package = tmp_path / "apex"
        package.mkdir()
        if kind == "clone":
            return
        (package / "__init__.py").write_text("raise ImportError" if kind == "unrelated" else "")
        if kind != "unrelated":
            (package / "normalization").mkdir()
            (package / "normalization" / "__init__.py").touch()
            (package / "normalization" / "fused_layer_norm.py").write_text(
                NVIDIA if kind != "old" else ""
            )
        if kind in ("nvidia", "old"):
            (tmp_path / "fused_layer_norm_cuda.py").touch()

    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield install
    for name in [n for n in sys.modules if n.split(".")[0] in ("apex", "fused_layer_norm_cuda")]:
        del sys.modules[name]


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on CUDA."""

    is_cuda = True


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (None, "NVIDIA apex is not installed"),
        ("clone", "NVIDIA apex is not installed"),
        ("unrelated", "is not NVIDIA's. The package index has an unrelated project"),
        ("python only", "without its CUDA extension"),
    ],
)
def test_unusable_apex_is_refused_with_the_reason(install_apex, kind, reason):
    """Asked for by name: the three cases are told apart, and each says how to build it."""
    if kind:
        install_apex(kind)
    lpln.enable("bf16")
    before = lpln.status()
    for name in ("apex", "apex_lean"):
        with pytest.raises(ImportError, match=reason) as error:
            lpln.enable("amp", backend=name)
        assert f"backend={name!r}: " in str(error.value)
        assert "https://github.com/NVIDIA/apex" in str(error.value)
    assert lpln.status() == before


def test_old_apex_has_no_lean(install_apex):
    """apex from before memory_efficient: "apex" goes, "apex_lean" is an ImportError, at once."""
    install_apex("old")
    assert backends.resolve("apex", Precision.AMP)[0] == "apex"
    with pytest.raises(ImportError, match="backend='apex_lean': this NVIDIA apex has no memory_ef"):
        lpln.enable(backend="apex_lean")
    assert lpln.status().precision is None


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("input_dtype", [FP32, "dtype"])
@pytest.mark.parametrize(("name", "suffix"), [("apex", ""), ("apex_lean", "_lean")])
def test_apex_is_called_with_everything_in_the_autocast_dtype(
    install_apex, dtype, input_dtype, name, suffix
):
    """x, weight and bias go to fused_layer_norm_affine in the autocast dtype, outside autocast.

    "apex_lean" passes its memory_efficient; "apex" passes nothing that an old one does not know.
    """
    install_apex("nvidia")
    resolved, normalise = backends.resolve(name, Precision.AMP)
    assert resolved == name
    x = torch.randn(4, 2, 8, dtype=dtype if input_dtype == "dtype" else FP32)
    x = x.as_subclass(CudaTensor)
    weight, bias = torch.randn(2, 2, 8)
    with autocast():
        y = normalise(x, torch.Size((2, 8)), weight, bias, 1e-3, dtype)
        plain = normalise(x, (8,), None, None, 1e-5, dtype)
    assert y.dtype is plain.dtype is dtype
    assert (y == 7).all()
    calls = importlib.import_module("apex.normalization.fused_layer_norm").CALLS
    shapes = [(4, 2, 8), (2, 8), (2, 8)]
    assert calls == [
        (f"affine{suffix}", [dtype] * 3, shapes, (2, 8), 1e-3),
        (f"plain{suffix}", [dtype], [(4, 2, 8)], (8,), 1e-5),
    ]


def test_apex_leaves_to_native_what_it_does_not_take(install_apex, layer_norm):
    """CPU tensors, a weight without bias, the other low precision, no rows: native."""
    install_apex("nvidia")
    lpln.enable(backend="apex")
    assert lpln.status().backend == "apex"
    x = torch.randn(4, 8)
    with autocast():
        got = layer_norm(x)
    assert torch.equal(
        got, native.normalise(x, (8,), layer_norm.weight, layer_norm.bias, 1e-5, BF16)
    )
    weight, bias = layer_norm.weight, layer_norm.bias
    for given, its_bias in ((x, None), (x.half(), bias), (x[:0], bias)):
        y = apex.normalise(given.as_subclass(CudaTensor), (8,), weight, its_bias, 1e-5, BF16)
        assert y.dtype is BF16
        assert y.shape == given.shape
    assert "apex.normalization.fused_layer_norm" not in sys.modules


@pytest.mark.skipif(
    _torch_compat.TORCH_VERSION < (2, 1), reason="torch.func and its questions; CI has later ones"
)
def test_apex_never_gets_what_its_extension_cannot_take(install_apex, layer_norm):
    """Under a functorch transform, fake, or an inference tensor to train on: native."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    install_apex("nvidia")
    weight, bias = layer_norm.weight, layer_norm.bias

    def normalise(x, *parameters):
        return apex.normalise(x, (8,), *(parameters or (weight, bias)), 1e-5, BF16)

    def loss(x):
        return normalise(x.as_subclass(CudaTensor)).float().pow(3).sum()

    x = torch.randn(4, 8)
    assert torch.func.grad(loss)(x).abs().sum() > 0
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = FakeTensor(mode, torch.empty(4, 8, device="meta"), torch.device("cuda", 0))
    assert normalise(fake, None, None).dtype is BF16
    with torch.inference_mode():
        inference = x.to(BF16).as_subclass(CudaTensor)
    normalise(inference).sum().backward()
    assert weight.grad.dtype is FP32
    assert "apex.normalization.fused_layer_norm" not in sys.modules


def test_old_torch_takes_apex_for_bfloat16(install_apex, monkeypatch):
    """Before torch 1.13, auto is apex where bfloat16 may come; native with a warning without."""
    monkeypatch.setattr(_torch_compat, "CUDA_NORMALISES_BFLOAT16", False)
    with pytest.warns(RuntimeWarning, match="NVIDIA apex is not installed"):
        assert backends.automatic(Precision.AMP) == "native"
    install_apex("nvidia")
    importlib.invalidate_caches()
    assert backends.automatic(Precision.AMP) == "apex"
    assert backends.automatic(Precision.AMP_BF16) == "apex"
    assert backends.automatic(Precision.AMP_FP16) == "native"


def test_old_torch_computes_bfloat16_in_float32(monkeypatch):
    """Native on an accelerator without a bfloat16 kernel: in float32, rounded once."""
    monkeypatch.setattr(native, "CUDA_NORMALISES_BFLOAT16", False)
    computed = []

    def operator(x, *call):
        computed.append(x.dtype)
        return torch.layer_norm(x, *call)

    x = torch.randn(4, 8, device="meta")
    for dtype in (BF16, FP16):
        assert native.lower(operator, x, (8,), None, None, 1e-5, dtype).dtype is dtype
    assert computed == [FP32, FP16]
