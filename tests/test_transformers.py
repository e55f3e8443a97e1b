"""The callback for transformers' Trainer, and that Trainer unchanged, against the real library."""

from __future__ import annotations

import json
import math

import pytest
from support import needs_library, run_python

needs_transformers = needs_library("transformers", "accelerate")  # its Trainer needs it

# Trains a BERT, whose LayerNorms all get float32 while they are stock. A result is the dtypes that
# they gave in training and in an evaluation after it, how often they ran in training, the loss, and
# the parameters.
PROGRAM = """
import gc, json, tempfile
import torch
from support import digest, layer_norm_dtypes
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

DATA = [{"input_ids": row, "labels": row[0] % 2} for row in torch.arange(256).view(16, 16) % 61]

def make_trainer(callbacks=(), model_class=BertForSequenceClassification, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=True, max_steps=3, learning_rate=1e-2,
        per_device_train_batch_size=8, save_strategy="no", report_to="none", disable_tqdm=True,
        **options,
    )
    return Trainer(
        model=model_class(config), args=arguments, train_dataset=DATA, eval_dataset=DATA,
        callbacks=list(callbacks),
    )

def train(callbacks=(), checkpoint=None, **options):
    trainer = make_trainer(callbacks, **options)
    if checkpoint is not None:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
    with layer_norm_dtypes(trainer.model) as in_training:
        loss = trainer.train().training_loss
    with layer_norm_dtypes(trainer.model) as after:
        trainer.evaluate()
    return {
        "in training": sorted(set(in_training)), "calls": len(in_training),
        "after": sorted(set(after)), "loss": loss, "parameters": digest(trainer.model),
    }
"""

WITHOUT_THE_VARIABLE = """
results = {"stock": train()}
from lpln_autopatch.integrations.transformers import LowPrecisionLayerNorm

results["an instance"] = train([LowPrecisionLayerNorm()])
results["the class"] = train([LowPrecisionLayerNorm])
for mode in ("reentrant", "non-reentrant"):
    results[mode] = train([LowPrecisionLayerNorm()], checkpoint=mode)
results["evaluating"] = train([LowPrecisionLayerNorm()], eval_strategy="steps", eval_steps=1)
results["stock again"] = train()
print(json.dumps(results))
"""

WITH_THE_VARIABLE = """
results = {"variable": train()}
for mode in ("reentrant", "non-reentrant"):
    results[mode] = train(checkpoint=mode)
print(json.dumps(results))
"""

RAISING = """
from lpln_autopatch.integrations.transformers import LowPrecisionLayerNorm

class RaisesOnce(BertForSequenceClassification):
    message = "failed on purpose"
    raised = False
    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, labels=labels, **kwargs)
        if not self.raised:
            self.raised = True
            raise RuntimeError(self.message)
        return outputs

def dtypes(model):
    with layer_norm_dtypes(model) as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        model.bert(DATA[0]["input_ids"][None])
    return sorted(set(seen))

def fail():
    trainer = make_trainer([LowPrecisionLayerNorm()], RaisesOnce)
    try:
        trainer.train()
    except RuntimeError as error:
        assert str(error) == RaisesOnce.message
    return trainer

results = {}
trainer = fail()
results["failed"] = dtypes(trainer.model)
trainer.train()
results["and trained"] = dtypes(trainer.model)
model = fail().model
gc.collect()
results["and gone"] = dtypes(model)

RaisesOnce.message = "DefaultCPUAllocator: can't allocate memory"
trainer = make_trainer([LowPrecisionLayerNorm()], RaisesOnce, auto_find_batch_size=True)
trainer.train()
results["smaller batch"] = [trainer.model.raised, *dtypes(trainer.model)]
print(json.dumps(results))
"""

SHARING = """
import copy, pickle
from transformers import TrainerState, TrainerCallback
from lpln_autopatch.integrations.transformers import LowPrecisionLayerNorm

def dtypes():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [str(torch.nn.LayerNorm(8)(torch.zeros(1, 8)).dtype)]

class Inside(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            make_trainer([shared]).train()
            results["behind an inner train"] = dtypes()
            copies.extend([copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))])

results, copies, shared = {}, [], LowPrecisionLayerNorm()
train([shared, Inside()])
results["behind the outer"] = dtypes()

for name, callback in zip(["copy", "unpickled"], copies):
    state = TrainerState()
    callback.on_train_end(None, state, None)
    callback.on_train_begin(None, state, None)
    results[name] = dtypes()
    del state
    results[name] += dtypes()
print(json.dumps(results))
"""

BF16, FP32 = ["torch.bfloat16"], ["torch.float32"]


def run(code: str, **environment: str) -> dict[str, object]:
    """Run the program; return the results in its last line. The Trainer prints too."""
    result = run_python("-c", PROGRAM + code, OMP_NUM_THREADS="1", **environment)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_the_variable():
    """Results of Trainers in one process, without and with the callback."""
    return run(WITHOUT_THE_VARIABLE)


@pytest.fixture(scope="module")
def with_the_variable():
    """Results of Trainers in a process with LPLN_PRECISION=amp."""
    return run(WITH_THE_VARIABLE, LPLN_PRECISION="amp")


@needs_transformers
@pytest.mark.parametrize("how", ["an instance", "the class"])
def test_callback_lowers_training_and_nothing_after(without_the_variable, how):
    """Given as an instance or a class: lowered in train(), stock in evaluate() behind it."""
    stock, lowered = without_the_variable["stock"], without_the_variable[how]
    assert (stock["in training"], stock["after"]) == (FP32, FP32)
    assert (lowered["in training"], lowered["after"]) == (BF16, FP32)
    assert lowered["parameters"] != stock["parameters"]
    assert math.isclose(lowered["loss"], stock["loss"], rel_tol=1e-3)


@needs_transformers
def test_evaluation_in_training_is_lowered(without_the_variable):
    """Evaluations that train() makes are part of it, and change nothing in its result."""
    evaluating, plain = without_the_variable["evaluating"], without_the_variable["an instance"]
    assert evaluating["calls"] > plain["calls"]
    assert (evaluating["in training"], evaluating["after"]) == (BF16, FP32)
    assert evaluating["parameters"] == plain["parameters"]


@needs_transformers
def test_trainer_behind_it_is_stock_to_the_bit(without_the_variable):
    """A Trainer without the callback trains as if none had been there."""
    assert without_the_variable["stock again"] == without_the_variable["stock"]


@needs_transformers
def test_variable_lowers_an_unchanged_trainer(with_the_variable, without_the_variable):
    """LPLN_PRECISION=amp: the parameters that the callback gives, and evaluate() lowered too."""
    variable = with_the_variable["variable"]
    assert (variable["in training"], variable["after"]) == (BF16, BF16)
    assert variable["parameters"] == without_the_variable["an instance"]["parameters"]


@needs_transformers
@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_no_bit(with_the_variable, without_the_variable, mode):
    """gradient_checkpointing_enable(): recomputed lowered, to the parameters of a run without."""
    for results, plain in (
        (with_the_variable, with_the_variable["variable"]),
        (without_the_variable, without_the_variable["an instance"]),
    ):
        assert results[mode]["calls"] > plain["calls"]
        assert results[mode]["in training"] == BF16
        assert results[mode]["parameters"] == plain["parameters"]


@needs_transformers
def test_train_that_raises_ends_its_block():
    """The callback's block ends with the next train(), or with the Trainer.

    Where the Trainer itself goes on, with a smaller batch, it is left once and for all.
    """
    results = run(RAISING)
    assert results == {
        "failed": BF16,
        "and trained": FP32,
        "and gone": FP32,
        "smaller batch": [True, *FP32],
    }


@needs_transformers
def test_every_training_ends_its_own_block():
    """A shared callback: an inner train() leaves the outer's block; a copy of it has none yet."""
    results = run(SHARING)
    assert results == {
        "behind an inner train": BF16,
        "behind the outer": FP32,
        "copy": [*BF16, *FP32],
        "unpickled": [*BF16, *FP32],
    }


@needs_transformers
def test_wrong_precision_is_refused_at_once():
    """A name that is no precision fails in the constructor, not when training begins."""
    from lpln_autopatch.integrations.transformers import LowPrecisionLayerNorm

    with pytest.raises(ValueError, match="bf61"):
        LowPrecisionLayerNorm("bf61")


def test_missing_transformers_is_named():
    """Without transformers the integration says what it needs and how to get it."""
    code = "import sys; sys.modules['transformers'] = None\n"
    code += "import lpln_autopatch.integrations.transformers"
    result = run_python("-c", code, check=False)
    assert "ImportError: lpln_autopatch.integrations.transformers needs" in result.stderr
    assert "pip install transformers" in result.stderr
