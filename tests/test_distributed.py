"""torchrun with DDP, fully_shard and activation checkpointing: two ranks on CPU, gloo."""

from __future__ import annotations

import json

import pytest
import torch
from support import needs_library, run_python

import lpln_autopatch
from lpln_autopatch import low_precision_layernorm
from lpln_autopatch._torch_compat import TORCH_VERSION

pytestmark = [
    pytest.mark.skipif(
        TORCH_VERSION < (2, 6), reason="fully_shard is public in torch >= 2.6; CI runs this there"
    ),
    pytest.mark.xdist_group("distributed"),  # one worker: the module's fixtures run once
]
BF16, FP32 = ["torch.bfloat16"], ["torch.float32"]

# Sharded models do not average gradients over Gloo in older ones, stock either (torch 2.7).
WAYS = ("ddp", "fully_shard", "hybrid") if TORCH_VERSION >= (2, 8) else ("ddp",)

# LayerNorms that get float32 while they are stock. Knows nothing of this package.
MODEL = (
    f"WAYS = {WAYS}\n"
    """
import torch

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
    def forward(self, x):
        x = self.norm(x)
        return x + self.linear(x)

def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block())

def watch(model):
    dtypes = []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda m, args, out: dtypes.append(str(out.dtype)))
    return dtypes

def train(model, batches, forward_block):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x in batches:
        with forward_block(), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x).float() - x.roll(1, -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

torch.manual_seed(1)
BATCHES = torch.randn(4, 16, 8)
"""
)

# Each rank takes half of each batch. With the variable everything runs as it is; without it, stock,
# and with a block around each forward, so that backward and its recomputation are behind it.
RANK = """
import contextlib, importlib.util, json, os
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), os.environ["RESULTS"]

def distribute(model, how):
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fully_shard":
        mesh = init_device_mesh("cpu", (2,))
    else:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def run(how, forward_block):
    model = make_model()
    dtypes = watch(model)
    for index, block in enumerate(model):
        model[index] = checkpoint_wrapper(block)
    model = distribute(model, how)
    losses = train(model, BATCHES[:, rank::2], forward_block)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return model, {
        "dtypes": sorted(set(dtypes)), "calls": len(dtypes), "losses": losses,
        "parameters": {name: value.tolist() for name, value in full.items()},
    }

if "LPLN_PRECISION" in os.environ:
    blocks = {"variable": contextlib.nullcontext}
else:
    from lpln_autopatch import low_precision_layernorm
    blocks = {"stock": contextlib.nullcontext, "block": low_precision_layernorm}
results = {}
for how in WAYS:
    for name, block in blocks.items():
        model, results[f"{how}, {name}"] = run(how, block)
    if importlib.util.find_spec("numpy"):  # which dcp cannot do without
        dcp.save(get_model_state_dict(model), checkpoint_id=os.path.join(folder, how))
with open(os.path.join(folder, f"{rank}.json"), "w") as file:
    json.dump(results, file)
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes abort a process while the interpreter shuts down
"""

# A process that does not have this package.
LOAD = """
import contextlib, json, os, sys
import torch.distributed.checkpoint as dcp
results = {}
for how in WAYS:
    model = make_model()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=os.path.join(os.environ["RESULTS"], how))
    model.load_state_dict(state)
    results[how] = {name: value.tolist() for name, value in model.state_dict().items()}
dtypes = watch(model)
train(model, BATCHES, contextlib.nullcontext)
print(json.dumps([results, sorted(set(dtypes)), "lpln_autopatch" in sys.modules]))
"""

# fully_shard's own mixed precision, without and with autocast.
POLICY = """
import contextlib, json, os, sys
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from lpln_autopatch import low_precision_layernorm
dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{sys.argv[1]}")

def run(autocast, block):
    model, seen = make_model(), set()
    for module in (model[0].norm, model[1].norm):
        module.register_forward_hook(
            lambda m, args, out: seen.add(" ".join(str(t.dtype) for t in (*args, m.weight, out)))
        )
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with block(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(BATCHES[0])
    y.float().square().mean().backward()
    values = [y, *(p.grad.full_tensor() for p in model.parameters())]
    return sorted(seen), [value.tolist() for value in values]

blocks = (contextlib.nullcontext, low_precision_layernorm)
print(json.dumps({str(on): [run(on, block) for block in blocks] for on in (False, True)}))
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads sometimes abort the process while the interpreter shuts down
"""


def torchrun(folder, **environment: str) -> list[dict[str, dict[str, object]]]:
    """The results of both ranks."""
    script = folder / "train.py"
    script.write_text(MODEL + RANK)
    run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)),
        RESULTS=str(folder),
        OMP_NUM_THREADS="1",
        **environment,
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder in which the ranks with the variable leave results and checkpoints."""
    return tmp_path_factory.mktemp("variable")


@pytest.fixture(scope="module")
def with_the_variable(folder):
    """Results of two ranks under LPLN_PRECISION=amp."""
    return torchrun(folder, LPLN_PRECISION="amp")


@pytest.fixture(scope="module")
def without_the_variable(tmp_path_factory):
    """Results of two ranks, stock and with a block around each forward."""
    return torchrun(tmp_path_factory.mktemp("block"))


every_way = pytest.mark.parametrize("how", WAYS)


def as_tensors(parameters: dict[str, list]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in parameters.items()}


@every_way
def test_every_rank_is_lowered(with_the_variable, without_the_variable, how):
    """All LayerNorms are lowered on both ranks, in checkpoints' recomputations too."""
    for rank in range(2):
        for lowered in (
            with_the_variable[rank][f"{how}, variable"],
            without_the_variable[rank][f"{how}, block"],
        ):
            assert lowered["dtypes"] == BF16
            assert lowered["calls"] == 2 * 4 * 2  # LayerNorms, steps, forward and recomputation
        assert without_the_variable[rank][f"{how}, stock"]["dtypes"] == FP32


@every_way
def test_ranks_agree(with_the_variable, how):
    """After training on data of their own both ranks have the same parameters; DDP's and sharded
    ones are the same too, so that the shards are of one model."""
    first, second = (rank[f"{how}, variable"] for rank in with_the_variable)
    assert first["losses"] != second["losses"]
    assert first["parameters"] == second["parameters"]
    torch.testing.assert_close(
        as_tensors(first["parameters"]),
        as_tensors(with_the_variable[0]["ddp, variable"]["parameters"]),
        rtol=1e-6,
        atol=1e-6,
    )


@every_way
def test_backward_behind_the_block_changes_no_bit(with_the_variable, without_the_variable, how):
    """A block around the forward alone gives the parameters that the variable gives; stock,
    other ones."""
    for rank in range(2):
        block = without_the_variable[rank][f"{how}, block"]
        assert block["parameters"] == with_the_variable[rank][f"{how}, variable"]["parameters"]
        assert block["parameters"] != without_the_variable[rank][f"{how}, stock"]["parameters"]


@every_way
def test_result_is_that_of_one_process(with_the_variable, how):
    """Two ranks learn what one lowered process learns from the whole batches."""
    program: dict = {}
    exec(MODEL, program)
    model = program["make_model"]()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    whole = program["train"](model, program["BATCHES"], low_precision_layernorm)
    lpln_autopatch.disable()
    ranks = [rank[f"{how}, variable"] for rank in with_the_variable]
    halves = [sum(losses) / 2 for losses in zip(*(r["losses"] for r in ranks), strict=True)]
    assert halves == pytest.approx(whole, rel=0.01)
    for name, value in as_tensors(ranks[0]["parameters"]).items():
        update = model.state_dict()[name] - initial[name]
        error = (value - model.state_dict()[name]).norm()
        assert error < 0.02 * update.norm(), name


@needs_library("numpy")
def test_checkpoint_loads_in_a_stock_process(with_the_variable, folder):
    """torch.distributed.checkpoint's files load, and train, where the package is not imported."""
    result = run_python(
        *("-c", MODEL + LOAD),
        RESULTS=str(folder),
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    loaded, dtypes, imported = json.loads(result.stdout)
    for how, parameters in loaded.items():
        assert parameters == with_the_variable[0][f"{how}, variable"]["parameters"]
    assert len(loaded) == len(WAYS)
    assert dtypes == FP32
    assert not imported


def test_mixed_precision_policy_leaves_nothing_to_lower(tmp_path):
    """MixedPrecisionPolicy(param_dtype=bfloat16) gives LayerNorm bfloat16 throughout; without
    autocast the same bits with the package as without, with autocast the same dtypes."""
    result = run_python("-c", MODEL + POLICY, str(tmp_path / "rendezvous"))
    results = json.loads(result.stdout)
    for stock, lowered in results.values():
        assert stock[0] == lowered[0] == [" ".join(BF16 * 3)]
    stock, lowered = results["False"]
    assert lowered == stock
