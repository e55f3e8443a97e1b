from __future__ import annotations

import pytest
import torch
from support import autocast, output_dtype, run_python

from lpln_autopatch.bench import call
from lpln_autopatch.bench.rivals import ComposerRecipe
from lpln_autopatch.torch_compat import CPU_TAKES_MIXED_DTYPES, TORCH_VERSION


@pytest.mark.skipif(TORCH_VERSION < (2, 2), reason="the recipe's CPU kernels are in torch >= 2.2")
def test_recipe_is_composers(layer_norm):
    """The rival casts x, weight and bias, and gives the autocast dtype; stock outside it."""
    recipe = ComposerRecipe(8)
    recipe.load_state_dict(layer_norm.state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(recipe(x), layer_norm(x))
    assert output_dtype(recipe) is torch.bfloat16
    with autocast():
        y = recipe(x)
    cast = [t.to(torch.bfloat16) for t in (x, recipe.weight, recipe.bias)]
    assert torch.equal(y, torch.nn.functional.layer_norm(cast[0], (8,), *cast[1:]))


def test_call_prints_every_ratio():
    """The benchmark runs as documented, and prints each pair for each input."""
    printed = run_python("-m", "lpln_autopatch.bench.call", "--rounds", "2").stdout
    for ours, rival in call.PAIRS:
        assert printed.count(f"{ours} / {rival}") == (8 if CPU_TAKES_MIXED_DTYPES else 4)
    assert "forward and backward, (4096, 1024), torch.float32 input" in printed


@pytest.mark.skipif(TORCH_VERSION < (2, 2), reason="the recipe's CPU kernels are in torch >= 2.2")
def test_error_prints_every_contender():
    """The error table runs as documented, and lowered is not above Composer's recipe in it."""
    printed = run_python("-m", "lpln_autopatch.bench.error", "--rows", "64").stdout
    rows = [line.split() for line in printed.splitlines()]
    lowered = [list(map(float, row[1:])) for row in rows if row[:1] == ["lowered"]]
    composer = [list(map(float, row[2:])) for row in rows if row[:1] == ["Composer's"]]
    assert len(lowered) == len(composer) == 8
    for ours, theirs in zip(lowered, composer, strict=True):
        assert all(o <= t for o, t in zip(ours, theirs, strict=True))


@pytest.mark.skipif(TORCH_VERSION < (2, 5), reason="torch >= 2.5 loads entry points; CI runs it")
@pytest.mark.parametrize("name", ["call", "error"])
def test_patched_process_is_refused(name):
    """With LPLN_PRECISION set there is no stock to compare with: one line, exit 1."""
    result = run_python("-m", f"lpln_autopatch.bench.{name}", check=False, LPLN_PRECISION="amp")
    assert result.returncode == 1
    assert "unset it" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["call", "error"])
def test_unusable_device_is_refused(name):
    """A device that this torch does not know, or have: one line, exit 1."""
    module = f"lpln_autopatch.bench.{name}"
    result = run_python("-m", module, "--device", "toaster", check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("--device toaster cannot be used here: ")
    assert "Traceback" not in result.stderr


def test_wrong_contender_is_not_timed(monkeypatch):
    """A contender whose values are wrong raises before it is timed."""

    class Wrong(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 1.1

    monkeypatch.setitem(call.MODULES, "Composer's recipe", Wrong)
    contender = call.Contender("Composer's recipe", torch.randn(8, 64), torch.bfloat16, False)
    with pytest.raises(RuntimeError, match="wrong"):
        contender.check()
