"""The callback for Lightning's Trainer, and that Trainer unchanged, against the real library."""

from __future__ import annotations

import json
import math

import pytest
from support import needs_library, run_python

needs_lightning = needs_library("lightning")

# Fits a model whose LayerNorms get float32 while they are stock. sys.argv[1] is the package. A
# result is the dtypes that they gave in fit() and behind it, the loss, and the parameters.
PROGRAM = """
import copy, importlib, json, pickle, sys, tempfile
import torch
from support import digest, layer_norm_dtypes
pl = importlib.import_module(sys.argv[1])

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.norm(x + self.linear(x))

class Model(pl.LightningModule):
    fails_in = None
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.Sequential(Block(), Block())
        self.head = torch.nn.Linear(8, 1)
    def step(self, batch):
        return self.head(self.blocks(batch[0])).float().square().mean()
    def training_step(self, batch, _):
        loss = self.step(batch)
        if self.fails_in == "training":
            raise RuntimeError("failed on purpose")
        self.log("loss", loss)
        return loss
    def validation_step(self, batch, _):
        self.log("validation loss", self.step(batch))
    test_step = validation_step
    def predict_step(self, batch, _):
        return self.step(batch)
    def setup(self, stage):
        if self.fails_in == "setup":
            raise RuntimeError("failed on purpose")
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

torch.manual_seed(1)
LOADER = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(torch.randn(32, 8)), batch_size=8
)

def make_trainer(*callbacks, precision="bf16-mixed", **options):
    # One callback may come without a list; then the class has to be the package's own.
    callbacks = callbacks[0] if len(callbacks) == 1 else list(callbacks)
    return pl.Trainer(
        accelerator="cpu", precision=precision, max_epochs=1, callbacks=callbacks,
        logger=False, enable_progress_bar=False, num_sanity_val_steps=0, enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(), **{"enable_checkpointing": False, **options},
    )

def dtypes(model):
    with layer_norm_dtypes(model) as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        model.blocks(torch.randn(4, 8))
    return sorted(set(seen))

def fit(*callbacks, **options):
    model, trainer = Model(), make_trainer(*callbacks, **options)
    result = {}
    with layer_norm_dtypes(model) as seen:
        trainer.fit(model, LOADER, LOADER)
    result["fit"] = sorted(set(seen))
    result["loss"] = trainer.callback_metrics["loss"].item()
    result["parameters"] = digest(model)
    for verb in ("validate", "test", "predict"):
        with layer_norm_dtypes(model) as seen:
            getattr(trainer, verb)(model, LOADER)
        result[verb] = sorted(set(seen))
    return result
"""

WITHOUT_THE_VARIABLE = """
from lpln_autopatch.integrations.lightning import LowPrecisionLayerNorm

results = {"stock": fit(), "callback": fit(LowPrecisionLayerNorm())}
results["not mixed"] = fit(LowPrecisionLayerNorm(), precision="32-true")
results["stock again"] = fit()

class AlsoFails(pl.Callback):
    def on_exception(self, trainer, module, exception):
        raise RuntimeError("failed on purpose")

def fail(where, *others):
    model, trainer = Model(), make_trainer(*others, LowPrecisionLayerNorm())
    model.fails_in = where
    try:
        trainer.fit(model, LOADER)
    except RuntimeError as error:
        assert str(error) == "failed on purpose"
        model.fails_in = None
        return trainer, model
    raise AssertionError("fit did not raise")

for where in ("setup", "training"):
    results[f"failed in {where}"] = dtypes(fail(where)[1])
trainer, model = fail("training", AlsoFails())
trainer.fit(model, LOADER)
results["another callback failed too, then fitted"] = dtypes(model)

class Inside(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 1:
            copies.extend([copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))])
            make_trainer(shared).validate(Model(), LOADER)
            make_trainer(shared).fit(Model(), LOADER)
            results["behind an inner fit"] = dtypes(Model())

shared, copies = LowPrecisionLayerNorm(), []
make_trainer(Inside(), shared).fit(Model(), LOADER)
results["behind the outer"] = dtypes(Model())
results["copies"] = [fit(callback) for callback in copies]

tuner = importlib.import_module(sys.argv[1] + ".tuner")
model, trainer = Model(), make_trainer(LowPrecisionLayerNorm())
model.lr = 0.1
with layer_norm_dtypes(model) as seen:
    tuner.Tuner(trainer).lr_find(model, LOADER, num_training=4)
results["learning rate finder"] = [sorted(set(seen)), dtypes(model)]

trainer = make_trainer(LowPrecisionLayerNorm(), enable_checkpointing=True)
trainer.fit(Model(), LOADER)
saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
results["callbacks in the checkpoint"] = list(saved["callbacks"])
print(json.dumps(results))
"""

BF16, FP32 = ["torch.bfloat16"], ["torch.float32"]


def run(code: str, package: str, **environment: str) -> dict[str, object]:
    """Run the program; return the results in its last line. The Trainer prints too."""
    result = run_python("-c", PROGRAM + code, package, OMP_NUM_THREADS="1", **environment)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def with_the_variable():
    """Results of a Trainer in a process with LPLN_PRECISION=amp."""
    return run("print(json.dumps(fit()))", "lightning.pytorch", LPLN_PRECISION="amp")


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def without_the_variable(request):
    """Results of Trainers in one process, without and with the callback."""
    return run(WITHOUT_THE_VARIABLE, request.param)


@needs_lightning
def test_callback_lowers_fit_and_nothing_after(without_the_variable):
    """fit() is lowered, with the validation in it; validate, test and predict are stock."""
    stock, lowered = without_the_variable["stock"], without_the_variable["callback"]
    assert (stock["fit"], lowered["fit"]) == (FP32, BF16)
    for verb in ("validate", "test", "predict"):
        assert stock[verb] == lowered[verb] == FP32
    assert lowered["parameters"] != stock["parameters"]
    assert math.isclose(lowered["loss"], stock["loss"], rel_tol=0.05)


@needs_lightning
def test_trainer_behind_it_is_stock_to_the_bit(without_the_variable):
    """A Trainer without the callback trains as if none had been there."""
    assert without_the_variable["stock again"] == without_the_variable["stock"]


@needs_lightning
def test_precision_that_is_not_mixed_lowers_nothing(without_the_variable):
    """Autocast decides: under precision="32-true" there is none."""
    assert without_the_variable["not mixed"]["fit"] == FP32


@needs_lightning
@pytest.mark.parametrize(
    "failed",
    ["failed in setup", "failed in training", "another callback failed too, then fitted"],
)
def test_fit_that_raises_leaves_nothing_on(without_the_variable, failed):
    """Stock behind fit(), wherever it raised; if on_exception did not reach us, after the next."""
    assert without_the_variable[failed] == FP32


@needs_lightning
def test_every_trainer_ends_its_own_block(without_the_variable):
    """A shared callback: another Trainer that runs inside fit() leaves the outer one lowered."""
    assert without_the_variable["behind an inner fit"] == BF16
    assert without_the_variable["behind the outer"] == FP32


@needs_lightning
def test_copies_of_the_callback_have_no_block_yet(without_the_variable):
    """A callback that was copied or pickled in the middle of fit() lowers its own fit()."""
    assert without_the_variable["copies"] == [without_the_variable["callback"]] * 2


@needs_lightning
def test_learning_rate_finder_is_lowered(without_the_variable):
    """The Tuner's fit is one: lowered, and stock after it, though it ends in the middle."""
    assert without_the_variable["learning rate finder"] == [BF16, FP32]


@needs_lightning
def test_checkpoint_knows_nothing_of_the_callback(without_the_variable):
    """A checkpoint loads where this package is not installed."""
    (only,) = without_the_variable["callbacks in the checkpoint"]
    assert only.startswith("ModelCheckpoint")


@needs_lightning
def test_variable_lowers_an_unchanged_trainer(with_the_variable, without_the_variable):
    """LPLN_PRECISION=amp: the parameters that the callback gives, and what is behind fit() too."""
    variable = with_the_variable
    assert variable["parameters"] == without_the_variable["callback"]["parameters"]
    for verb in ("fit", "validate", "test", "predict"):
        assert variable[verb] == BF16


@needs_lightning
def test_variable_lowers_where_torch_loads_no_entry_points(without_the_variable):
    """Lightning's own entry point gives the Trainer the callback: fit() is lowered, and no more."""
    program = PROGRAM + "print(json.dumps(fit()))"
    closed = {"LPLN_PRECISION": "amp", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    result = run_python("-c", program, "lightning.pytorch", **closed)
    assert json.loads(result.stdout.splitlines()[-1]) == without_the_variable["callback"]


@needs_lightning
def test_wrong_precision_is_refused_at_once():
    """A name that is no precision fails in the constructor, not when fit() begins."""
    from lpln_autopatch.integrations.lightning import LowPrecisionLayerNorm

    with pytest.raises(ValueError, match="bf61"):
        LowPrecisionLayerNorm("bf61")


def test_missing_lightning_is_named():
    """Without Lightning the integration says what it needs and how to get it."""
    code = "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
    code += "import lpln_autopatch.integrations.lightning"
    result = run_python("-c", code, check=False)
    assert "ImportError: lpln_autopatch.integrations.lightning needs Lightning" in result.stderr
    assert "pip install lightning" in result.stderr
