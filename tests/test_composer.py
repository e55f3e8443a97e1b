"""The algorithm for Composer's Trainer, against the real one. `make test-composer` installs it."""

from __future__ import annotations

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
    assert Ours.required_on_load() == Theirs.required_on_load()


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
