"""docs/examples/train.py: an unchanged script, run with one environment variable."""

from __future__ import annotations

import json

import pytest
from support import ROOT, run_forked, run_python

from lpln_autopatch._torch_compat import TORCH_VERSION

pytestmark = pytest.mark.skipif(
    TORCH_VERSION < (2, 5), reason="the script's torch.amp.GradScaler is newer; CI runs it there"
)

SCRIPT = str(ROOT / "docs" / "examples" / "train.py")
SMALL = ("--steps", "20", "--width", "32", "--layers", "2", "--heads", "2", "--context", "32")

OPTIONS = {"eager": [], "float16": ["--dtype", "float16"], "compiled": ["--compile"]}

# The script as it is, once for each list of options. What Inductor makes of it does not matter.
RUNS = """
import functools, json, runpy, sys
import torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
for options in json.loads(sys.argv[1]):
    sys.argv = options
    runpy.run_path(options[0], run_name="__main__")
    print("---")
"""


def train(precision: str) -> dict[str, dict[str, str]]:
    """The summary of the script on CPU, for each of OPTIONS."""
    runs = [[SCRIPT, "--device", "cpu", *SMALL, *options] for options in OPTIONS.values()]
    result = run_python("-c", RUNS, json.dumps(runs), LPLN_PRECISION=precision, timeout=600)
    assert result.stderr.count("20/20") >= len(OPTIONS)  # the progress bar
    printed = [part.splitlines() for part in result.stdout.split("---\n")[:-1]]
    summaries = [dict(line.split("\t") for line in lines) for lines in printed]
    return dict(zip(OPTIONS, summaries, strict=True))


@pytest.fixture(scope="module")
def stock():
    """Return the summaries of the example without the variable."""
    return train("")


@pytest.fixture(scope="module")
def lowered():
    """Return the summaries of the example under LPLN_PRECISION=amp."""
    return train("amp")


@pytest.mark.xdist_group("example")  # one worker: the module's fixtures run once
@pytest.mark.parametrize("how", OPTIONS)
def test_variable_lowers_every_layernorm_of_the_script(stock, lowered, how):
    """Stock gives float32 LayerNorms, LPLN_PRECISION=amp the autocast dtype; both learn."""
    stock, lowered = stock[how], lowered[how]
    dtype = "torch.float16" if how == "float16" else "torch.bfloat16"
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
    result = run_forked(SCRIPT, "--steps", "5", check=False)
    assert result.returncode == 2
    assert "--steps 5" in result.stderr
