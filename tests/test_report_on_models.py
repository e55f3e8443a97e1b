"""report(model, *inputs) on other people's models, beside the dtypes that are observed.

Tiny random configurations; nothing is downloaded. `make test-frameworks` installs the libraries.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import autocast, needs_library

import lpln_autopatch
from lpln_autopatch import low_precision_layernorm, report

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


def observed(model, inputs) -> list[bool]:
    """Return for each call of F.layer_norm if a float32 norm's result is bfloat16."""
    seen = []
    function = F.layer_norm

    def spy(x, *args, **kwargs):
        y = function(x, *args, **kwargs)
        seen.append(y.dtype is torch.bfloat16)
        return y

    F.layer_norm = spy
    try:
        with torch.no_grad(), autocast():
            model(**inputs)
    finally:
        F.layer_norm = function
    return seen


TRANSFORMERS = needs_library("transformers")
TIMM = needs_library("timm")


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        pytest.param(bert, 5, marks=TRANSFORMERS),
        pytest.param(gpt2, 5, marks=TRANSFORMERS),
        pytest.param(vit, 5, marks=TRANSFORMERS),
        pytest.param(whisper, 12, marks=TRANSFORMERS),
        pytest.param(convnext, 9, marks=TRANSFORMERS),
        pytest.param(timm_vit, 5, marks=TIMM),
        pytest.param(timm_convnext, 9, marks=TIMM),
        pytest.param(timm_swin, 7, marks=TIMM),
    ],
)
def test_every_layer_norm_call_is_lowered(make, calls):
    """The report and a spy agree that each call is lowered, by any way to call layer_norm."""
    model, inputs = make()
    with low_precision_layernorm("amp"):
        with torch.no_grad(), autocast():
            result = report(model.eval(), **inputs)
        assert observed(model, inputs) == [True] * calls
    assert (result.lowered, result.calls) == (calls, calls), str(result)
    assert {row.output_dtype for row in result.rows} == {torch.bfloat16}
    assert str(result).endswith(f"{calls} of {calls} norm calls are lowered")


@needs_library("transformers")
def test_norms_computed_by_hand_are_named():
    """T5's RMSNorm calls no function of PyTorch's: all are in the report, lowered if asked for."""
    model, inputs = t5()
    for norms, lowered in (("all", 12), ("layer_norm", 0)):
        with low_precision_layernorm(norms=norms), torch.no_grad(), autocast():
            result = report(model.eval(), **inputs)
        assert (result.calls, result.lowered) == (12, lowered)
        assert {row.norm for row in result.rows} == {"rms_norm"}
        reason = "" if lowered else "hand-written: norms='hand_written' lowers it"
        assert {row.reason for row in result.rows} == {reason}


@needs_library("accelerate")
@pytest.mark.parametrize("first", ["hook", "activation"])
def test_accelerates_hook_is_lowered_whenever_it_came(first):
    """A hook holds the forward of its time. The function beneath is lowered all the same."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    if first == "activation":
        lpln_autopatch.enable("amp")
    add_hook_to_module(model[0], ModelHook())
    lpln_autopatch.enable("amp")
    with autocast():
        (row,) = report(model, torch.randn(4, 8)).rows
        assert model(torch.randn(4, 8)).dtype is torch.bfloat16
    assert row.lowered
    assert row.name == "0"
