"""Libraries that need no integration, unchanged, against the real ones: Accelerate and timm."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
from support import ROOT, autocast, digest, layer_norm_dtypes, needs_library, run_python

import lpln_autopatch
from lpln_autopatch import low_precision_layernorm

needs_accelerate = needs_library("accelerate")
needs_timm = needs_library("timm")
BF16, FP32 = {"torch.bfloat16"}, {"torch.float32"}

# A training loop as Accelerate's documentation has it. A result is the dtypes that the LayerNorms
# gave, that of the model's output, the last loss, and the parameters.
ACCELERATE = """
import json, os
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from support import digest, layer_norm_dtypes

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.norm(x + self.linear(x))

def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block())

def train():
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.utils.data.DataLoader(torch.linspace(-1, 1, 256).view(32, 8), batch_size=8)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    with layer_norm_dtypes(model) as dtypes:
        for x in data:
            y = model(x)
            loss = (y - x.roll(1, -1)).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return {
        "norms": sorted(set(dtypes)), "output": str(y.dtype), "loss": loss.item(),
        "parameters": digest(model),
    }

def dtypes(model):
    with layer_norm_dtypes(model) as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(4, 8))
    return sorted(set(seen))

hooked = make_model()
for block in hooked:
    add_hook_to_module(block.norm, AlignDevicesHook())
results = {"at first": train(), "hooked": dtypes(hooked)}
if "LPLN_PRECISION" not in os.environ:
    from lpln_autopatch import low_precision_layernorm
    with low_precision_layernorm("bf16"):
        results["block"] = train()
        results["hooked before the block"] = dtypes(hooked)
    results["behind the block"] = train()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def accelerate_program(tmp_path_factory):
    """Runs that program, by `python` or by `accelerate launch`."""
    script = tmp_path_factory.mktemp("accelerate") / "train.py"
    script.write_text(ACCELERATE)

    def run(*command: str, **environment: str) -> dict[str, object]:
        environment = {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", **environment}
        result = run_python(*command, str(script), **environment)
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def without_the_variable(accelerate_program):
    """Results of `python train.py`."""
    return accelerate_program()


@needs_accelerate
@pytest.mark.parametrize(
    "launcher", [(), ("-m", "accelerate.commands.launch", "--cpu")], ids=["python", "launch"]
)
def test_variable_lowers_an_accelerate_loop(accelerate_program, without_the_variable, launcher):
    """LPLN_PRECISION=amp, by `python` and by `accelerate launch`: lowered; the output float32."""
    stock = without_the_variable["at first"]
    lowered = accelerate_program(*launcher, LPLN_PRECISION="amp")["at first"]
    assert (set(stock["norms"]), set(lowered["norms"])) == (FP32, BF16)
    assert lowered["output"] == stock["output"] == "torch.float32"
    assert lowered["parameters"] == without_the_variable["block"]["parameters"]
    assert lowered["parameters"] != stock["parameters"]
    assert math.isclose(lowered["loss"], stock["loss"], rel_tol=0.01)


@needs_accelerate
def test_accelerate_loop_behind_a_block_is_stock_to_the_bit(without_the_variable):
    """The same loop before and behind a block that it also ran in gives the same parameters."""
    assert set(without_the_variable["block"]["norms"]) == BF16
    assert without_the_variable["behind the block"] == without_the_variable["at first"]


@needs_accelerate
def test_modules_with_accelerates_hooks_are_lowered(accelerate_program, without_the_variable):
    """Whenever they got their hooks: the forward that a hook keeps calls the function."""
    assert set(without_the_variable["hooked"]) == FP32
    assert set(without_the_variable["hooked before the block"]) == BF16
    assert set(accelerate_program(LPLN_PRECISION="amp")["hooked"]) == BF16


@pytest.fixture
def images():
    return torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.fixture
def timm_model():
    """Makes a small Swin or ViT, with timm's own switch for fast norms off or on."""

    def make(name: str, fast_norm: bool = False) -> torch.nn.Module:
        import timm
        from timm.layers import set_fast_norm

        options = {"swin": {"window_size": 4, "depths": (2,)}, "vit": {"depth": 2}}[name]
        architecture = {"swin": "swin_tiny_patch4_window7_224", "vit": "vit_tiny_patch16_224"}
        torch.manual_seed(0)
        set_fast_norm(fast_norm)
        try:
            model = timm.create_model(
                architecture[name],
                pretrained=False,
                img_size=32,
                num_classes=5,
                embed_dim=16,
                num_heads=(2,) if name == "swin" else 2,
                **options,
            )
        finally:
            set_fast_norm(False)
        # The stem in float32: on CPU a LayerNorm shows that it is lowered by such an input only.
        model.patch_embed.proj.register_forward_hook(lambda m, args, out: out.float())
        return model

    return make


def step(model: torch.nn.Module, images: torch.Tensor, lower: bool) -> tuple[list[str], str]:
    """What LayerNorms give in a forward, lowered or not, and in the backward behind it, call by
    call, and the parameters after a step of SGD."""
    block = low_precision_layernorm() if lower else contextlib.nullcontext()
    with layer_norm_dtypes(model) as dtypes:
        with block, autocast():
            loss = model(images).float().square().mean()
        lpln_autopatch.disable()
        loss.backward()
    assert math.isfinite(loss.item())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return dtypes, digest(model)


@needs_timm
@pytest.mark.parametrize("fast_norm", [False, True])
def test_timm_swin_is_lowered(timm_model, images, fast_norm):
    """Swin's norms are torch.nn.LayerNorm: lowered. timm's switch is not theirs, and changes
    no bit."""
    before, stock = step(timm_model("swin", fast_norm), images, lower=False)
    lowered, parameters = step(timm_model("swin", fast_norm), images, lower=True)
    assert (set(before), set(lowered)) == (FP32, BF16)
    assert parameters != stock
    assert parameters == step(timm_model("swin"), images, lower=True)[1]
    assert stock == step(timm_model("swin"), images, lower=False)[1]


@needs_timm
def test_timm_gradient_checkpointing_changes_no_bit(timm_model, images):
    """set_grad_checkpointing(): a backward behind the block, and disable(), recomputes lowered."""
    plain, expected = step(timm_model("swin"), images, lower=True)
    model = timm_model("swin")
    model.set_grad_checkpointing()
    checkpointed, parameters = step(model, images, lower=True)
    assert len(checkpointed) > len(plain)
    assert set(checkpointed) == BF16
    assert parameters == expected


@needs_timm
@pytest.mark.parametrize("fast_norm", [False, True])
def test_timm_vit_is_lowered(timm_model, images, fast_norm):
    """ViT's norms have timm's own forward, which calls the function. With timm's switch that calls
    it without autocast: the same bits lowered and stock."""
    stock = step(timm_model("vit", fast_norm), images, lower=False)
    lowered = step(timm_model("vit", fast_norm), images, lower=True)
    assert set(stock[0]) == (BF16 if fast_norm else FP32)
    assert set(lowered[0]) == BF16
    assert (lowered == stock) is fast_norm


def test_integrations_are_imported_by_nobody_else():
    """All other modules of the package together import none of `integrations`, and no library."""
    code = """
import contextlib, importlib, pkgutil, sys, lpln_autopatch
for module in pkgutil.walk_packages(lpln_autopatch.__path__, "lpln_autopatch."):
    if not module.name.startswith(("lpln_autopatch.integrations", "lpln_autopatch.__main__")):
        with contextlib.suppress(ImportError):  # a backend whose library is missing
            importlib.import_module(module.name)
libraries = ("accelerate", "composer", "lightning", "pytorch_lightning", "timm", "transformers")
print("lpln_autopatch._forward" in sys.modules, [
    n for n in sys.modules if n in libraries or n.startswith("lpln_autopatch.integrations.")
])
"""
    assert run_python("-c", code).stdout == "True []\n"
