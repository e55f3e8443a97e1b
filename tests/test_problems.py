"""docs/problems.md: each error there, raised where the page says, and gone with its remedy."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.nn.functional as F
from support import ROOT, autocast, run_forked

from lpln_autopatch import exempt, low_precision_layernorm
from lpln_autopatch._torch_compat import TORCH_VERSION
from lpln_autopatch.backends import native

BF16, FP32 = torch.bfloat16, torch.float32
PAGE = (ROOT / "docs" / "problems.md").read_text()
ERRORS = re.findall(r'^### "(.*)"$', PAGE, re.MULTILINE)

# The words of an error change, and CUDA's autocast lists are on the CPU from torch 2.13 on.
pytestmark = pytest.mark.skipif(TORCH_VERSION < (2, 13), reason="older words; CI runs newer ones")


@contextlib.contextmanager
def cuda_lists():
    """CUDA's autocast lists on the CPU, and autocast to bfloat16."""
    from lpln_autopatch.bench.policy import policy

    with policy("cpu"), autocast():
        yield


@contextlib.contextmanager
def raises(error: str):
    """A failure with this text, which is a heading of the page."""
    assert error in ERRORS
    with pytest.raises((RuntimeError, TypeError, ValueError), match=re.escape(error)):
        yield


# Cures


class Attention(torch.nn.Module):
    """Queries and keys go through RMSNorm, and values do not, as in Flux."""

    def __init__(self, kernel):
        super().__init__()
        self.qkv, self.kernel = torch.nn.Linear(32, 96), kernel
        self.norm_q, self.norm_k = torch.nn.RMSNorm(32), torch.nn.RMSNorm(32)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.kernel(self.norm_q(q), self.norm_k(k), v)


def flash_attention(q, k, v):
    """Refuses what flash-attn refuses: anything but float16 and bfloat16."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return F.scaled_dot_product_attention(q, k, v)


def memory_efficient_attention(q, k, v):
    """Refuses what xformers refuses: dtypes that differ."""
    if not q.dtype is k.dtype is v.dtype:
        raise ValueError("Query/Key/Value should either all have the same dtype, or (...)")
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        (flash_attention, "FlashAttention only support fp16 and bf16 data type"),
        (memory_efficient_attention, "Query/Key/Value should either all have the same dtype"),
    ],
)
def test_all_norms_cure_attention_that_takes_one_dtype(kernel, error):
    """q and k are float32 behind RMSNorm, stock and with LayerNorm alone; with norms="all" not.

    Reported in:
        https://github.com/huggingface/diffusers/issues/14104
        https://github.com/bghira/SimpleTuner/pull/3002
        https://github.com/kohya-ss/musubi-tuner/pull/1037
        https://github.com/facebookresearch/xformers/issues/1046
    """
    attention, x = Attention(kernel), torch.randn(2, 5, 32)
    with cuda_lists():
        with raises(error):
            attention(x)
        with low_precision_layernorm(), raises(error):
            attention(x)
        with low_precision_layernorm(norms="all"):
            assert attention(x).dtype is BF16


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_grouped_mm_gets_one_dtype(norm):
    """Experts in bfloat16 behind a norm: autocast does not cast for grouped_mm.

    Reported in:
        https://github.com/huggingface/transformers/issues/43828
        https://github.com/pytorch/pytorch/issues/174763
    """
    norm = getattr(torch.nn, norm)(64)
    experts, ends = torch.randn(2, 64, 16, dtype=BF16), torch.tensor([2, 4], dtype=torch.int32)
    x = torch.randn(4, 64, dtype=BF16)
    with cuda_lists():
        older = "expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16"
        newer = "Expected mat_a and mat_b to have the same dtype, got Float and BFloat16"  # 2.15
        with pytest.raises(RuntimeError, match=f"{re.escape(older)}|{re.escape(newer)}"):
            F.grouped_mm(norm(x), experts, offs=ends)
        with low_precision_layernorm(norms="all"):
            assert F.grouped_mm(norm(x), experts, offs=ends).dtype is BF16


@pytest.mark.parametrize(
    ("norm", "error"),
    [
        (torch.nn.LayerNorm(4), "expected scalar type BFloat16 but found Float"),
        (torch.nn.GroupNorm(2, 4), "Expected scalar types of X and dY are same"),
    ],
)
def test_gradients_can_be_vmapped(norm, error):
    """A float32 weight beside a bfloat16 x on the CPU: torch.vmap of torch.autograd.grad fails.

    Reported in:
        https://github.com/pytorch/pytorch/issues/184890
    """
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), norm, torch.nn.Linear(4, 1))

    def jacobian():
        with autocast():
            y = model(torch.randn(8, 4)).squeeze()
        weight = model[0].weight
        return torch.vmap(lambda v: torch.autograd.grad(y, weight, grad_outputs=v)[0])(torch.eye(8))

    with raises(error):
        jacobian()
    with low_precision_layernorm(norms="all"):
        assert jacobian().shape == (8, 4, 4)


KEPT = """
import torch
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch.bench import counting, emulated

model = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.RMSNorm(512))
with emulated.accelerator() as accelerator:
    emulated.move(model)
    x = torch.randn(4096, 8, device=emulated.NAME)
    def forward():
        with torch.autocast(emulated.NAME, dtype=torch.bfloat16):
            return model(x).sum()
    kept = [counting.count(forward, model, accelerator, [x])["kept"]]
    with low_precision_layernorm(norms="all"):
        kept.append(counting.count(forward, model, accelerator, [x])["kept"])
print(*kept)
"""


def test_rms_norm_keeps_no_float32_copy():
    """Eager stock keeps a float32 copy of a bfloat16 x for backward; lowered keeps x itself.

    Reported in:
        https://github.com/pytorch/pytorch/issues/188955
    """
    stock, lowered = map(int, run_forked("-c", KEPT).stdout.split())
    x = 4096 * 512
    assert 0 <= stock - 4 * x < x
    assert 0 <= lowered - 2 * x < x


# Causes


@pytest.fixture
def norm():
    """A backbone that ends in a norm. Its input is float32: stock gives float32 on any device."""
    return torch.nn.LayerNorm(8)


X, TARGET = torch.linspace(-1, 1, 32).reshape(4, 8), torch.full((4, 8), 0.5)


def island(norm, cast=False):
    """A head that switches autocast off inside the region, to run in float32."""
    head = torch.nn.Linear(8, 3)
    with autocast():
        f = norm(X)
        with autocast(enabled=False):
            return head(f.float() if cast else f)


def probe(norm, cast=False):
    """A linear probe on features, behind the region."""
    with torch.no_grad(), autocast():
        f = norm(X)
    return torch.nn.Linear(8, 3)(f.float() if cast else f)


def similarity(norm, cast=False):
    """Features times float32 ones, behind the region."""
    with autocast():
        f = norm(X)
    return (f.float() if cast else f) @ TARGET.T


def distil(norm, cast=False):
    """A loss behind the region, of features and a float32 target."""
    with autocast():
        f = norm(X)
    loss = F.huber_loss(f.float() if cast else f, TARGET)
    loss.backward()
    return loss


def fourier(norm, cast=False):
    """A Fourier transform, which autocast on the CPU casts for, and on CUDA not."""
    with cuda_lists():
        f = norm(X)
        return torch.fft.rfft(f.float() if cast else f).abs()


def masked(norm, cast=False):
    """A float32 mask token is written into the features."""
    token = torch.nn.Parameter(torch.zeros(8))
    with autocast():
        f = norm(X)
        f = f.float() if cast else f.clone()
        f[torch.tensor([True, False, False, True])] = token
        return f


def scattered(norm, cast=False):
    """Replace some rows of a float32 residual stream by the norm's output for them."""
    mask = torch.tensor([True, False, False, True])
    with autocast():
        f = norm(X[mask])
        return X.masked_scatter(mask[:, None], f.float() if cast else f)


def to_numpy(norm, cast=False):
    """NumPy has no bfloat16."""
    pytest.importorskip("numpy", reason="not beside torch 1; CI has it on later ones")
    with torch.no_grad(), autocast():
        f = norm(X)
    return torch.from_numpy((f.float() if cast else f).numpy())


CAUSES = [
    (island, "mat1 and mat2 must have the same dtype, but got BFloat16 and Float"),
    (probe, "mat1 and mat2 must have the same dtype, but got BFloat16 and Float"),
    (similarity, "expected m1 and m2 to have the same dtype, but got: c10::BFloat16 != float"),
    (distil, "Found dtype Float but expected BFloat16"),
    (fourier, "Unsupported dtype BFloat16"),
    (masked, "Index put requires the source and destination dtypes match"),
    (scattered, "masked_scatter: expected self and source to have same dtypes"),
    (to_numpy, "Got unsupported ScalarType BFloat16"),
]


@pytest.mark.parametrize(("program", "error"), CAUSES)
def test_code_that_needs_float32_fails_and_has_two_remedies(norm, program, error):
    """Such code runs stock, fails lowered, and runs with the norm exempt or with a cast."""
    assert program(norm).dtype is FP32
    with low_precision_layernorm():
        with raises(error):
            program(norm)
        assert program(norm, cast=True).dtype is FP32
        assert program(exempt(norm)).dtype is FP32


def test_float16_overflows_where_x_is_rounded_first():
    """The recipe of a GPU gives NaN for an x beyond 65504; stock, and the CPU's way, do not."""
    x, weight, bias = 1e5 * X, torch.ones(8), torch.zeros(8)
    assert x.max() > 65504
    rounded = F.layer_norm(x.half().float(), (8,), weight, bias)
    assert rounded.isnan().any()
    stock = F.layer_norm(x, (8,), weight, bias)
    lowered = native.normalise(x, (8,), weight, bias, 1e-5, torch.float16)
    assert lowered.dtype is torch.float16
    assert torch.equal(lowered, stock.half())


def test_every_error_of_the_page_is_tested():
    """A heading in quotes is the text of an error that a test above raises."""
    source = (ROOT / "tests" / "test_problems.py").read_text()
    assert len(ERRORS) == len(set(ERRORS)) >= 10
    for error in ERRORS:
        assert f'"{error}"' in source, error
