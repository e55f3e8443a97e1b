"""`bench count`: the emulated policy against CUDA's lists, and the counts against a hand's."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from support import SMALL_MODELS, run_forked

from lpln_autopatch._torch_compat import TORCH_VERSION

pytestmark = pytest.mark.skipif(
    TORCH_VERSION < (2, 13), reason="counting needs torch 2.13; CI runs it there"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def count(folder: Path, *arguments: str) -> tuple[str, dict[str, dict]]:
    """Return the output of `bench count` without its date, and the figures by contender."""
    (folder / "small.py").write_text(SMALL_MODELS)
    file = folder / "figures.json"
    command = ["-m", "lpln_autopatch", "bench", "count", *arguments, "--json", str(file)]
    printed = run_forked(*command, cwd=folder).stdout
    rows = json.loads(file.read_text())["suites"]["count"]
    figures = {row["contender"]: row["figures"] for row in rows if row["figures"]}
    return printed.partition("count:")[2], figures


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def counted(request, tmp_path_factory):
    """Return the output and the figures of a model that can be run beside one that cannot."""
    models = ("--models", "small:make", "small:fails")
    return count(tmp_path_factory.mktemp("count"), *models, "--dtype", request.param)


shares_a_run = pytest.mark.xdist_group("count")  # one worker: the module's fixture runs once


@shares_a_run
def test_small_model_is_as_counted_by_hand(counted):
    """Kept bytes, and those of the norm and of the casts, are the sums of what PyTorch needs."""
    _, figures = counted
    x = 4 * 8  # elements of x, of the norm's input and of its output
    statistics = 2 * 4 * 4  # mean and 1 / std of four rows, float32
    stock, native = figures["stock"], figures["native"]
    # The two matrices' inputs, the norm's input in float32, statistics.
    assert stock["kept"] == 2 * (2 * x) + 4 * x + statistics
    # The norm's input in two bytes, and its weight and bias, cast.
    assert native["kept"] == 2 * (2 * x) + 2 * x + statistics + 2 * (8 + 8)
    # Forward: x, weight, bias in, y, statistics out. Backward: dy, x, statistics, weight, bias in;
    # dx, dweight, dbias out.
    for counts, width in ((stock, 4), (native, 2)):
        forward = width * (x + 8 + 8 + x) + statistics
        backward = width * (x + x + 8 + 8) + statistics + width * (x + 8 + 8)
        assert counts["norms"] == forward + backward
    # A cast moves six bytes an element. Both cast x, the matrices, their biases and their
    # gradients. Stock casts the norm's input, its output and both gradients; lowered its two
    # parameters and theirs.
    both = 6 * (x + 2 * (8 * 8 + 8 + 8 + 1))
    assert stock["casts"] - both - 6 * (4 * x) == native["casts"] - both - 6 * (4 * 8)
    assert (stock["norm_calls"], stock["lowered_calls"]) == (1, 0)
    assert (native["norm_calls"], native["lowered_calls"]) == (1, 1)
    assert figures["recipe"] == native  # Composer's recipe is what native does there


@shares_a_run
def test_kernels_are_as_counted_by_hand(counted):
    """fused and lean count as their kernels: the bytes that these read, write and keep."""
    _, figures = counted
    x, rows, n = 4 * 8, 4, 8
    both, parameters, slots = 2 * (2 * x), 4 * (n + n), 4 * n
    partials = 4 * 2 * rows * n  # of as many programs as there are rows
    reduced = partials + parameters
    # The two matrices' inputs and a bfloat16 x, which is kept as it is, mean and 1 / std.
    fused, lean = figures["fused"], figures["lean"]
    assert fused["kept"] == both + 2 * x + 8 * rows
    forward = 2 * x + parameters + 2 * x + 8 * rows
    backward = 2 * (2 * x) + 4 * n + 8 * rows + 2 * x + partials
    assert fused["norms"] == forward + backward + reduced
    # y is the next matrix's input; 1 / std, slots, and a column of xhat.
    assert lean["kept"] == both + 4 * rows + slots + 2 * rows
    forward = 2 * x + parameters + 2 * x + 4 * rows + slots + 2 * 4
    backward = 2 * (2 * x) + parameters + 4 * rows + slots + 2 * x + partials
    assert lean["norms"] == forward + backward + reduced
    for counts in (fused, lean):
        assert (counts["norm_calls"], counts["lowered_calls"]) == (1, 1)
        assert counts["casts"] == figures["stock"]["casts"] - 6 * (4 * x)


COUNTED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import copy
import torch
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch.bench import emulated, kernels

NORMS = {
    "layer_norm": torch.nn.LayerNorm(64),
    "no bias": torch.nn.LayerNorm(64, bias=False),
    "no parameters": torch.nn.LayerNorm(64, elementwise_affine=False),
    "rms_norm": torch.nn.RMSNorm(64),
}

def kept(norm, x, backend, device):
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((tuple(t.shape), t.dtype)) or t, lambda t: t)
    block = low_precision_layernorm(backend=backend, norms="all")
    with block, torch.autocast(device, dtype=torch.bfloat16), hooks:
        y = norm(x)
    y.float().sum().backward()
    return kept, [tuple(p.grad.shape) for p in norm.parameters()], x.grad.dtype

emulated.add_device()  # before the first backward
for name, norm in NORMS.items():
    for backend, counted in kernels.NAMES.items():
        for dtype in (torch.float32, torch.bfloat16):
            norm.zero_grad()
            real = kept(norm, torch.randn(8, 64, dtype=dtype, requires_grad=True), backend, "cpu")
            with emulated.accelerator(), kernels.named():
                fake_norm = copy.deepcopy(norm)
                emulated.move(fake_norm)
                x = torch.randn(8, 64, dtype=dtype, device=emulated.NAME, requires_grad=True)
                fake = kept(fake_norm, x, counted, emulated.NAME)
            assert real == fake, (name, backend, dtype, real, fake)
            print("same")
"""


def test_kernels_are_counted_as_they_keep():
    """The operators keep for backward as many tensors as the kernels, of equal shape and dtype."""
    assert run_forked("-c", COUNTED).stdout.split() == ["same"] * 16


@shares_a_run
@pytest.mark.parametrize("counted", ["bfloat16"], indirect=True)
def test_few_columns_are_printed_by_default(counted, tmp_path):
    """native and lean; with --all-columns fused, the recipe and the bound of time as well."""
    header = next(line for line in counted[0].splitlines() if line.startswith("| eager"))
    few = [column.strip() for column in header.split("|")[2:-1]]
    assert few == ["batch", "norms lowered", *(
        c for what in ("kept", "moved", "peak") for c in (f"{what} GiB", "native", "lean")
    )]  # fmt: skip
    printed, _ = count(tmp_path, "--models", "small:make", "--all-columns")
    header = next(line for line in printed.splitlines() if line.startswith("| eager"))
    columns = [column.strip() for column in header.split("|")[2:-1]]
    assert columns.count("fused") == columns.count("recipe") == 4
    assert "least ms" in columns


@shares_a_run
@pytest.mark.parametrize("counted", ["bfloat16"], indirect=True)
def test_two_runs_print_the_same(counted, tmp_path):
    """Neither a clock nor chance is in the output."""
    models = ("--models", "small:make", "small:fails")
    assert count(tmp_path, *models, "--dtype", "bfloat16") == counted


def test_compiled_is_counted_from_its_graphs(tmp_path):
    """A forward and a backward graph are counted; lowered hands less between them than stock."""
    _, figures = count(tmp_path, "--models", "small:make", "--modes", "compiled")
    assert {f["graphs"] for f in figures.values()} == {2}
    assert all(f["kernels"] > 4 and f["moved"] > 0 for f in figures.values())
    # x, the norm's input and output in two bytes, the statistics; nothing else is needed.
    assert figures["recipe"]["kept"] <= figures["stock"]["kept"]


@shares_a_run
def test_model_that_cannot_be_run_leaves_the_others(counted):
    """A model that cannot be run is a line that says why; earlier counts are kept."""
    printed, figures = counted
    assert figures["native"]["kept"] > 0
    assert "not measured: stock, model small:fails" in printed


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("toast", "'toast' is no model; valid: all, bert-base, gpt2, "),
        ("no_such_module:make", "there is no module 'no_such_module' in this folder, nor on PYTH"),
        ("small.no:make", "there is no module 'small.no'"),
        ("small:needs", "there is no module 'no_such_dependency' in this folder"),
        ("small:missing", "small:missing: module 'small' has no attribute 'missing'"),
        ("small:broken", "small:broken: Could not import module 'Broken'."),
        ("small:nothing", "small:nothing gives NoneType, not a torch.nn.Module"),
        ("small:fails", "small:fails cannot be counted: Linear has no make_batch(self, items, "),
        ("small:unfed", "small:unfed cannot be counted: its make_batch fails: AttributeError: "),
        ("small:configured", "its inputs cannot be made (AttributeError: "),
    ],
)
def test_wrong_model_is_one_line(tmp_path, model, message):
    """A model that is not there, or cannot be run: one line that says why, status 2."""
    (tmp_path / "small.py").write_text(SMALL_MODELS)
    command = ["-m", "lpln_autopatch", "bench", "count", "--models", model]
    result = run_forked(*command, check=False, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    *before, line = result.stderr.splitlines()
    assert message in line
    # All models are built before the first is counted.
    is_made = "cannot be counted" in line
    assert before == [f"count, {model}, eager, bfloat16 (1 of 1)"] * is_made


def operators_of(lists: object) -> list[tuple]:
    """PyTorch's own tests of CUDA's lists: where, name, arguments, and the dtype of the result."""
    cases = []
    for attribute, dtype in [
        ("torch_fp16", None),
        ("nn_fp16", None),
        ("methods_fp16", None),
        ("torch_fp32", FP32),
        ("nn_fp32", FP32),
        ("methods_fp32", FP32),
        ("torch_need_autocast_promote", FP32),
    ]:
        for name, *rest in getattr(lists, attribute):
            if name != "einsum":  # its entry is no call: the equation is of other tensors
                kwargs = rest[1] if len(rest) > 1 and isinstance(rest[1], dict) else {}
                cases.append((attribute, name, rest[0], kwargs, dtype))
    return cases


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_policy_is_that_of_cudas_lists(dtype):
    """Every operator that PyTorch tests under CUDA's autocast gives the same dtype here."""
    from torch.testing._internal.autocast_test_lists import AutocastTestLists

    from lpln_autopatch.bench.policy import policy

    torch.manual_seed(0)
    ran = set()
    with policy("cpu"), torch.autocast("cpu", dtype=dtype):
        for where, name, arguments, kwargs, expected in operators_of(AutocastTestLists("cpu")):
            owner = torch.nn.functional if where.startswith("nn") else torch
            if where.startswith("nn") and not hasattr(owner, name):
                owner = torch._C._nn
            owner, arguments = (
                (arguments[0], arguments[1:]) if where.startswith("methods") else (owner, arguments)
            )
            with contextlib.suppress(NotImplementedError):  # no kernel on CPU
                result = getattr(owner, name)(*arguments, **kwargs)
                result = result if isinstance(result, torch.Tensor) else result[0]
                assert result.dtype is (expected or dtype), f"{where}: {name}"
                ran.add(name)
    assert len(ran) > 80, ran


def test_policy_leaves_the_cpus_as_it_was():
    """LayerNorm gives float32 inside, as on CUDA, and afterwards bfloat16 again, as on CPU."""
    from lpln_autopatch.bench.policy import policy

    norm, x = torch.nn.LayerNorm(8), torch.randn(4, 8, dtype=BF16)
    with torch.autocast("cpu", dtype=BF16):
        assert norm(x).dtype is BF16
        with policy("cpu"):
            assert norm(x).dtype is FP32
            assert torch.nn.functional.softmax(x, -1).dtype is FP32
        assert norm(x).dtype is BF16


def test_weights_are_cast_once_in_a_region():
    """A weight is cast once for all uses, as by autocast's own cache, until the region ends."""
    from lpln_autopatch.bench.policy import policy

    linear, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with policy("cpu") as cuda:
        with torch.autocast("cpu", dtype=BF16):
            linear(linear(x))
            assert len(cuda._casts) == 2  # weight, bias
            before = {key: cast for key, (_, cast) in cuda._casts.items()}
            linear(x)
            assert all(cuda._casts[key][1] is cast for key, cast in before.items())
        assert not cuda._casts


KEPT = """
import sys, torch
sys.path.insert(0, {folder!r})
from lpln_autopatch.bench import counting, emulated
from lpln_autopatch.bench.policy import policy
from lpln_autopatch.bench.recipe import ComposerRecipe
from lpln_autopatch.bench.contenders import Contender

def block():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), layer, torch.nn.LayerNorm(32))

def kept(contender, device, policy, drops=False):
    x = torch.randn(2, 8, 16, device=device)
    model = block()
    if device != "cpu":
        emulated.move(model)
    def forward():
        with torch.autocast(device, dtype=torch.bfloat16):
            if drops:
                model(x).exp()
            return model(x).float().square().mean()
    with contender.applied(model):
        return counting.count(forward, model, policy, [x])["kept"]

for contender in (Contender("stock"), Contender("recipe", ComposerRecipe)):
    with emulated.accelerator() as accelerator:
        counted = kept(contender, emulated.NAME, accelerator)
        assert kept(contender, emulated.NAME, accelerator, drops=True) == counted
    with policy("cpu") as cpu:
        real = kept(contender, "cpu", cpu)
    print(real, counted)
"""


def test_kept_bytes_are_those_of_real_training(tmp_path):
    """The emulated accelerator counts the bytes that training on the CPU keeps.

    What forward itself drops is not among them.
    """
    printed = run_forked("-c", KEPT.format(folder=str(tmp_path))).stdout
    pairs = [tuple(map(int, line.split())) for line in printed.splitlines()]
    (stock, counted_stock), (recipe, counted_recipe) = pairs
    random_state = 24  # of the flash kernel; the CPU's has none
    # 16 rows in three norms: CUDA keeps mean and 1 / std in float32, the CPU for a bfloat16 x not.
    statistics = 16 * 3 * 2 * 2
    assert counted_stock == stock + random_state
    assert counted_recipe == recipe + random_state + statistics
    assert counted_recipe < counted_stock


ON_THE_ACCELERATOR = """
import torch
from torch.utils.checkpoint import checkpoint
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch.bench import emulated

norm = torch.nn.LayerNorm(8)
with emulated.accelerator(), torch.autocast(emulated.NAME, dtype=torch.bfloat16):
    emulated.move(norm)
    x = torch.randn(4, 8, device=emulated.NAME, requires_grad=True)
    print("stock", norm(x).dtype)
    with low_precision_layernorm():
        y = norm(x)
        print("lowered", y.dtype, y.grad_fn.next_functions[0][0].name())
        with torch.autocast(emulated.NAME, enabled=False):
            print("off", norm(x).dtype)
        with torch.inference_mode():
            frozen = torch.randn(4, 8, device=emulated.NAME, dtype=torch.bfloat16)
        print("inference", norm(frozen).dtype)
        seen = []
        hook = norm.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        y = checkpoint(norm, x, use_reentrant=False)
    y.float().sum().backward()
    print("checkpoint", *seen, x.grad.dtype, norm.weight.grad.dtype)
"""


def test_native_takes_its_accelerators_path_where_the_device_is_no_cpu():
    """x is rounded first; an inner region stays stock; a checkpoint is recomputed as it was."""
    printed = run_forked("-c", ON_THE_ACCELERATOR).stdout.replace("torch.", "").splitlines()
    assert printed == [
        "stock float32",
        "lowered bfloat16 ToCopyBackward0",
        "off float32",
        "inference bfloat16",
        # It compares what it recomputes, here outside of the block, with the dtypes of the forward.
        "checkpoint bfloat16 float32 float32",
    ]
