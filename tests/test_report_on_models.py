"""report(model) on other people's models: its verdicts against the dtypes that hooks observe.

Tiny random configurations; nothing is downloaded. `make test-frameworks` installs the libraries.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from support import autocast

import lpln_autopatch
from lpln_autopatch import low_precision_layernorm, report
from lpln_autopatch.verdicts import Verdict

LIBRARIES = ("transformers", "timm", "accelerate")
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
if MISSING and os.environ.get("LPLN_TEST_FRAMEWORKS"):
    raise ImportError(f"LPLN_TEST_FRAMEWORKS is set, and not installed: {', '.join(MISSING)}")


def needs(library: str) -> pytest.MarkDecorator:
    """Skips where `library` is missing."""
    reason = f"needs {library}; `make test-frameworks`, and CI, have it"
    return pytest.mark.skipif(library in MISSING, reason=reason)


TOKENS = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"image_size": 32, "patch_size": 8}


def bert():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=50, intermediate_size=32, **SMALL))
    return model, {"input_ids": TOKENS}


def gpt2():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8))
    return model, {"input_ids": TOKENS}


def vit():
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(intermediate_size=32, **SMALL, **VISION))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def whisper():
    from transformers import WhisperConfig, WhisperModel

    halves = {
        f"{half}_{key}": value
        for half in ("encoder", "decoder")
        for key, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=50, d_model=16, num_mel_bins=8, max_source_positions=10, **halves, **tokens
    )
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": TOKENS}
    return WhisperModel(config), inputs


def t5():
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5Model(config), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def convnext():
    from transformers import ConvNextConfig, ConvNextModel

    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def timm_model(name: str, **options: object):
    import timm

    return timm.create_model(name, **options), {"x": torch.randn(2, 3, 64, 64)}


def timm_vit():
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm_model("vit_tiny_patch16_224", **sizes)


def timm_convnext():
    return timm_model("convnext_atto", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))


def timm_swin():
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    return timm_model("swin_tiny_patch4_window7_224", img_size=64, **sizes)


def given_dtypes(model, inputs) -> dict[str, set[torch.dtype]]:
    """The dtypes that each norm-like module gives for float32 inputs, under autocast on CPU.

    float32, because that is where stock and lowered differ on CPU.
    """
    given: dict[str, set[torch.dtype]] = {}
    handles = []
    for row in report(model).rows:
        module = model.get_submodule(row.name)
        seen = given.setdefault(row.name, set())
        handles += [
            module.register_forward_pre_hook(lambda m, args: (args[0].float(), *args[1:])),
            module.register_forward_hook(lambda m, args, y, seen=seen: seen.add(y.dtype)),
        ]
    with torch.no_grad(), autocast():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return given


def lowered_by_activation(model, inputs) -> dict[str, bool]:
    """Whether an activation makes each norm-like module give bfloat16 in place of float32."""
    stock = given_dtypes(model, inputs)
    with low_precision_layernorm("amp"):
        active = given_dtypes(model, inputs)
    assert all(dtypes == {torch.float32} for dtypes in stock.values())
    assert all(len(dtypes) == 1 for dtypes in active.values())
    return {name: dtypes == {torch.bfloat16} for name, dtypes in active.items()}


@pytest.mark.parametrize(
    ("make", "modules"),
    [
        pytest.param(bert, 5, marks=needs("transformers")),
        pytest.param(gpt2, 5, marks=needs("transformers")),
        pytest.param(vit, 5, marks=needs("transformers")),
        pytest.param(whisper, 12, marks=needs("transformers")),
        pytest.param(t5, 0, marks=needs("transformers")),
        pytest.param(timm_vit, None, marks=needs("timm")),
        pytest.param(timm_convnext, None, marks=needs("timm")),
        pytest.param(timm_swin, None, marks=needs("timm")),
    ],
)
def test_report_is_what_hooks_observe(make, modules):
    """Every norm-like module of the model runs, and is lowered if and only if the report says so.

    How many are, is pinned for transformers: it uses torch's class or has one of its own.
    """
    model, inputs = make()
    rows = report(model.eval()).rows
    observed = lowered_by_activation(model, inputs)
    assert {row.name: row.verdict.covered for row in rows} == observed
    assert rows
    if modules is not None:
        assert sum(observed.values()) == modules


@needs("transformers")
def test_uncertain_verdict_leaves_nothing_out():
    """transformers' ConvNext calls super().forward: lowered, and reported as what may be."""
    model, inputs = convnext()
    observed = lowered_by_activation(model.eval(), inputs)
    verdicts = {row.name: row.verdict for row in report(model).rows}
    assert set(verdicts.values()) == {Verdict.LOWERED, Verdict.MAYBE}
    assert all(observed.values())


@needs("accelerate")
@pytest.mark.parametrize("active", [False, True])
def test_accelerates_hook_is_what_it_was_when_it_came(active):
    """A hook put on before the activation keeps the module stock; one put on after does not."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    if active:
        lpln_autopatch.enable("amp")
    add_hook_to_module(model[0], ModelHook())
    lpln_autopatch.enable("amp")
    (row,) = report(model).rows
    assert row.verdict is (Verdict.LOWERED if active else Verdict.INSTANCE)
    with autocast():
        assert model(torch.randn(4, 8)).dtype is (torch.bfloat16 if active else torch.float32)
