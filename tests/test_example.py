"""docs/examples/train.py: an unchanged script, run with one environment variable."""

from __future__ import annotations

import pytest
from support import NO_CPP, ROOT, run_python

from lpln_autopatch.torch_compat import TORCH_VERSION

pytestmark = pytest.mark.skipif(
    TORCH_VERSION < (2, 5), reason="the script's torch.amp.GradScaler is newer; CI runs it there"
)

SCRIPT = str(ROOT / "docs" / "examples" / "train.py")
SMALL = ("--steps", "20", "--width", "32", "--layers", "2", "--heads", "2", "--context", "32")

# The script as it is, but Inductor generates no C++.
WITHOUT_CPP = f"""
import runpy, sys
import torch._inductor.config
for name, value in {NO_CPP}.items():
    setattr(torch._inductor.config, name, value)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(*options: str, precision: str = "") -> dict[str, str]:
    """Run the script on CPU, and its summary."""
    arguments = [SCRIPT, "--device", "cpu", *SMALL, *options]
    if "--compile" in options:
        arguments = ["-c", WITHOUT_CPP, *arguments]
    result = run_python(*arguments, LPLN_PRECISION=precision, timeout=600)
    assert "20/20" in result.stderr  # the progress bar
    return dict(line.split("\t") for line in result.stdout.splitlines())


@pytest.mark.parametrize("options", [(), ("--compile",), ("--dtype", "float16")], ids=str)
def test_variable_lowers_every_layernorm_of_the_script(options):
    """Stock gives float32 LayerNorms, LPLN_PRECISION=amp the autocast dtype; both learn."""
    stock, lowered = train(*options), train(*options, precision="amp")
    dtype = "torch.float16" if "float16" in options else "torch.bfloat16"
    assert stock["LayerNorm output dtypes"] == "torch.float32"
    assert lowered["LayerNorm output dtypes"] == dtype
    assert stock.keys() == lowered.keys()
    loss = "final loss (mean of the last tenth)"
    assert float(stock[loss]) < 5.0  # 5.55 = ln 256 untrained
    assert abs(float(stock[loss]) - float(lowered[loss])) < 0.05
    for summary in (stock, lowered):
        assert float(summary["tokens per second"].replace(",", "")) > 0
        assert float(summary["saved for backward, MiB"]) > 0


def test_script_knows_nothing_of_the_package():
    """The example is plain PyTorch."""
    with open(SCRIPT) as file:
        assert "lpln" not in file.read().lower()


def test_too_few_steps_are_refused():
    """Steps that would all be warm-up: an error that says so."""
    result = run_python(SCRIPT, "--steps", "5", check=False)
    assert result.returncode == 2
    assert "--steps 5" in result.stderr
