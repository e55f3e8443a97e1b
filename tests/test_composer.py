"""The algorithm for Composer's Trainer, against the real one. `make test-composer` installs it."""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings

import pytest
import torch
from support import autocast, run_elsewhere, run_python

from lpln_autopatch import LPLayerNorm

HAS_COMPOSER = importlib.util.find_spec("composer") is not None
if os.environ.get("LPLN_TEST_COMPOSER") and not HAS_COMPOSER:
    raise ImportError("LPLN_TEST_COMPOSER is set, and Composer is not installed")

needs_composer = run_elsewhere(not HAS_COMPOSER, "make test-composer")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    """A ComposerModel with one LayerNorm."""
    from composer.models import ComposerModel

    class Model(ComposerModel):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)
            )

        def forward(self, batch):
            return self.layers(batch[0])

        def loss(self, outputs, batch):
            return torch.nn.functional.cross_entropy(outputs, batch[1])

    return Model()


@needs_composer
@pytest.mark.parametrize("precision", ["AMP_BF16", "AMP_FP16", "FP32"])
def test_apply_on_a_state(model, precision):
    """apply() lowers the state's model for its precision; FP32 leaves it, with a warning."""
    from composer.core import Event, Precision, State
    from composer.devices import DeviceCPU

    from lpln_autopatch import NoEffectWarning
    from lpln_autopatch.integrations.composer import LowPrecisionLayerNorm

    state = State(
        model=model,
        rank_zero_seed=0,
        run_name="test",
        device=DeviceCPU(),
        precision=Precision[precision],
    )
    algorithm = LowPrecisionLayerNorm()
    assert algorithm.match(Event.INIT, state)
    assert not algorithm.match(Event.FIT_START, state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        algorithm.apply(Event.INIT, state, None)
    lowered = precision != "FP32"
    assert isinstance(model.layers[1], LPLayerNorm) == lowered
    assert any(issubclass(w.category, NoEffectWarning) for w in caught) != lowered


@needs_composer
def test_constructor_is_composers():
    """The same events are taken and refused; ours is an Algorithm, and has a backend."""
    from composer.algorithms import LowPrecisionLayerNorm as Theirs
    from composer.core import Algorithm, Event

    from lpln_autopatch.integrations.composer import LowPrecisionLayerNorm as Ours

    for event in Event:
        for cls in (Ours, Theirs):
            if event in (Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD):
                assert cls(apply_at=event).match(event, None)
            else:
                with pytest.raises(ValueError, match=r"Event\.INIT"):
                    cls(apply_at=event)
    assert isinstance(Ours(backend="native"), Algorithm)
    assert Ours().required_on_load() == Theirs.required_on_load()


@needs_composer
def test_fit_with_the_trainer(model):
    """Trainer(algorithms=[...]) takes it and trains."""
    from composer import Trainer

    from lpln_autopatch.integrations.composer import LowPrecisionLayerNorm

    data = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randint(2, (32,)))
    before = model.layers[0].weight.detach().clone()
    trainer = Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=8),
        max_duration="2ep",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=[LowPrecisionLayerNorm()],
        device="cpu",
        precision="fp32",
        progress_bar=False,
    )
    trainer.fit()
    assert int(trainer.state.timestamp.batch) == 8
    assert not torch.equal(model.layers[0].weight, before)


def algorithms(whose):
    """The algorithms of a Trainer: Composer's, ours, or none."""
    from composer.algorithms import LowPrecisionLayerNorm as Theirs

    from lpln_autopatch.integrations.composer import LowPrecisionLayerNorm as Ours

    return {"ours": [Ours(backend="native")], "theirs": [Theirs()], "none": []}[whose]


def fit(model, folder, whose, batches, monkeypatch, **options):
    """Train on CPU in bfloat16, which Composer allows on a GPU only, and give the Trainer."""
    from composer import Trainer

    monkeypatch.setattr("composer.trainer.trainer._validate_precision", lambda *arguments: None)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(2, (64,)))
    trainer = Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=8),
        max_duration=f"{batches}ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=algorithms(whose),
        device="cpu",
        precision="amp_bf16",
        progress_bar=False,
        save_folder=str(folder),
        save_overwrite=True,
        **options,
    )
    trainer.fit()
    return trainer


MADE_UP = ("recreating the algorithm failed", "following forms", "No LayerNorm")


@needs_composer
@pytest.mark.parametrize("saved", ["ours", "theirs"])
@pytest.mark.parametrize("loads", ["ours", "theirs", "none"])
def test_checkpoint_loads_with_exactly_one_of_the_two(model, tmp_path, monkeypatch, saved, loads):
    """The Trainer's own algorithm stays. One without gets Composer's, and is told that, once."""
    from composer.algorithms.low_precision_layernorm.low_precision_layernorm import (
        LPLayerNorm as Theirs,
    )

    stock = copy.deepcopy(model)
    fit(model, tmp_path, saved, 2, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_path = str(tmp_path / "latest-rank0.pt")
        trainer = fit(stock, tmp_path, loads, 4, monkeypatch, load_path=load_path)
    assert int(trainer.state.timestamp.batch) == 4
    (algorithm,) = trainer.state.algorithms
    norm = trainer.state.model.layers[1]
    assert type(norm) is (LPLayerNorm if loads == "ours" else Theirs)
    trained = [p for group in trainer.state.optimizers[0].param_groups for p in group["params"]]
    assert any(parameter is norm.weight for parameter in trained)
    messages = [str(warning.message) for warning in caught]
    assert not [m for m in messages if any(part in m for part in MADE_UP)]
    added = [m for m in messages if "Automatically adding" in m]
    assert len(added) == (loads == "none")
    assert repr(algorithm) in "".join(added) or not added
    if loads == "ours":
        with autocast():
            assert norm(torch.randn(4, 8)).dtype is torch.bfloat16


@needs_composer
@pytest.mark.parametrize("order", [["ours", "theirs"], ["theirs", "ours"]])
def test_both_algorithms_in_a_trainer_are_refused(model, order):
    """Composer's replaces the modules that ours has changed: an error that says to keep one."""
    from composer import Trainer

    both = [algorithm for whose in order for algorithm in algorithms(whose)]
    with pytest.raises(ValueError, match="Keep one"):
        Trainer(model=model, algorithms=both, device="cpu", precision="fp32")


@needs_composer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_near_composers_layernorm(dtype):
    """Beside Composer's LPLayerNorm: its dtype, its values, and no larger error."""
    from composer.algorithms.low_precision_layernorm.low_precision_layernorm import (
        LPLayerNorm as Theirs,
    )

    ours, theirs = LPLayerNorm(256), Theirs(256)
    torch.nn.init.normal_(ours.weight, 1.0, 0.2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(64, 256)
    exact = torch.nn.functional.layer_norm(x.double(), (256,), ours.weight.double())
    torch.set_autocast_enabled("cuda", True)  # the one that theirs asks about, on any device
    try:
        with autocast(dtype):
            got, expected = ours(x), theirs(x)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert got.dtype is expected.dtype is dtype
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert (got - exact).norm() <= (expected - exact).norm()


@run_elsewhere(HAS_COMPOSER, "make test")
def test_missing_composer_is_named():
    """Without Composer the integration says what it needs and how to get it."""
    result = run_python("-c", "import lpln_autopatch.integrations.composer", check=False)
    assert "needs MosaicML Composer" in result.stderr
    assert "pip install mosaicml" in result.stderr
