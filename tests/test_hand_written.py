"""Norms that classes write out: recognised by what they compute, and lowered."""

from __future__ import annotations

import types

import hand_written_norms
import pytest
import torch
from hand_written_norms import (
    NORMS,
    CastingLayerNorm,
    GemmaRMSNorm,
    LlamaRMSNorm,
    autocast,
    by_hand,
    needs_hand_written,
    report_of,
    run,
)
from support import needs_dynamo, needs_library
from torch import nn
from torch.utils.checkpoint import checkpoint

import lpln_autopatch as lpln
from lpln_autopatch import exempt, low_precision_layernorm, report
from lpln_autopatch._torch_compat import DYNAMO_TELLS_FLOATS, TORCH_VERSION

pytestmark = needs_hand_written
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("make", NORMS)
def test_norm_is_lowered_among_all(make):
    """A norm is lowered while the functions and methods that it calls are exchanged as well."""
    with low_precision_layernorm(norms="all"):
        assert run(make(), torch.randn(NORMS[make])).dtype is BF16


def test_exempt_norm_is_stock():
    """An exempt norm is stock by itself, in an exempt parent, and without the hooks of a call."""
    model = nn.Sequential(LlamaRMSNorm(), nn.Sequential(LlamaRMSNorm()))
    x = torch.randn(4, 8)
    exempt(model[1])
    with by_hand(), autocast():
        assert model[0](x).dtype is BF16
        assert model[1](x).dtype is FP32
        assert model[1][0].forward(x).dtype is FP32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_as_its_forward_ran(reentrant):
    """Backward after the block has closed recomputes in the dtype of the forward."""
    dtypes = []

    class Model(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            dtypes.append(y.dtype)
            return torch.sin(y)  # whose saved y is recomputed

    model = Model(LlamaRMSNorm())
    x = torch.randn(4, 8, requires_grad=True)
    with by_hand(), autocast():
        y = checkpoint(model, x, use_reentrant=reentrant)
    y.float().sum().backward()
    assert dtypes == [BF16, BF16]


@needs_dynamo
@pytest.mark.parametrize("make", [LlamaRMSNorm, GemmaRMSNorm, lambda: CastingLayerNorm(8)])
def test_compiled_code_follows_each_switch(make):
    """Compiled code follows switches and eps from the first activation on, in two graphs."""
    with by_hand():
        pass  # from now on
    graphs = []
    model = nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 8), make())

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def outputs(x):
        return [x := layer(x) for layer in model]

    compiled = torch.compile(outputs, backend=count, fullgraph=True)
    x = torch.randn(4, 8)
    for _ in range(2):
        with autocast():
            compiled(x)

        with by_hand(), autocast():
            assert [y.dtype for y in compiled(x)] == [BF16] * 4
    assert len(graphs) == 2
    model[1].eps = 2.0
    if not DYNAMO_TELLS_FLOATS:
        return
    with by_hand(), autocast():
        torch.testing.assert_close(compiled(x)[1], model[1](model[0](x)), rtol=0.02, atol=0.02)


@needs_dynamo
@pytest.mark.skipif(not DYNAMO_TELLS_FLOATS, reason="dynamic floats; CI runs this on later ones")
@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_compiled_norm_has_the_values_and_gradients_of_eager(make, dtype):
    """A compiled norm has fullgraph and dynamic shapes; 1e5 does not overflow under float16."""
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    scale = 1e5 if dtype is FP16 else 1.0
    results = []
    with by_hand(), torch.autocast("cpu", dtype=dtype):
        for f in (module, compiled):
            x = scale * torch.randn(NORMS[make], generator=torch.Generator().manual_seed(0))
            y = f(x.requires_grad_())
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            (y.float() * dy).sum().backward()
            results.append([y, scale * x.grad, *(p.grad for p in module.parameters())])
            module.zero_grad()
    assert results[0][0].dtype is results[1][0].dtype is dtype
    assert results[0][0].stride() == results[1][0].stride()
    for eager, graph in zip(*results, strict=True):
        assert graph.isfinite().all()
        assert (graph - eager).norm() <= 0.02 * eager.norm()


@needs_dynamo
def test_compiled_code_follows_a_method_of_the_modules_own():
    """A method that is replaced on the instance, before and after compilation, is what runs."""
    module, x = GemmaRMSNorm(), torch.randn(4, 8)
    with by_hand():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert run(compiled, x).dtype is BF16
        module._norm = lambda x: 3 * x
        assert torch.equal(run(compiled, x), 3 * x * (1 + module.weight))
        del module._norm
        assert run(compiled, x).dtype is BF16


@needs_dynamo
@pytest.mark.parametrize("first", ["stock", "lowered"])
def test_code_compiled_during_a_switch_follows_from_then_on(first):
    """Code traced before the switch of another thread, and guarded after it, follows."""
    from compiled import norm_with_pauses

    with by_hand():
        pass  # from now on

    def enable():
        lpln.enable("bf16", norms="hand_written")

    def clear():  # the forwards stay exchanged
        lpln.enable("bf16", norms="group_norm")

    before, meanwhile = (clear, enable) if first == "stock" else (enable, clear)
    before()
    compiled, x = norm_with_pauses(meanwhile, norm=LlamaRMSNorm()), torch.randn(4, 8)
    run(compiled, x)
    assert run(compiled, x).dtype is (BF16 if first == "stock" else FP32)
    before()
    assert run(compiled, x).dtype is (FP32 if first == "stock" else BF16)


def test_torchscript_and_tracing_are_stock():
    """A module that is scripted or traced while a request is active runs stock."""
    module, x = LlamaRMSNorm(), torch.randn(4, 8)
    with by_hand(), autocast():
        scripted = torch.jit.script(module)
        traced = torch.jit.trace(module, x)
        assert scripted(x).dtype is FP32
        assert traced(x).dtype is FP32
        assert module(x).dtype is BF16


@needs_dynamo
@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_is_stock(strict):
    """torch.export takes the forward as it is written."""
    if strict and TORCH_VERSION < (2, 7):
        pytest.skip("nothing tells there that Dynamo exports; CI runs this on later ones")
    module, x = LlamaRMSNorm(), torch.randn(4, 8)
    with by_hand(), autocast():
        program = torch.export.export(nn.Sequential(module), (x,), strict=strict)
        assert program.module()(x).dtype is FP32
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("rms_norm" in name for name in names)


def test_report_says_what_is_computed_and_why_not():
    """Rows of norms by hand: lowered, not asked for, not recognised, cast back."""
    casting = CastingLayerNorm(8)
    model = nn.Sequential(LlamaRMSNorm(), hand_written_norms.UnbiasedNorm(), casting)
    x = torch.randn(4, 8)
    with by_hand():
        rows = report_of(model, x).rows
    assert [(r.norm, r.input_dtype, r.output_dtype, r.lowered) for r in rows] == [
        ("rms_norm", FP32, BF16, True),
        ("UnbiasedNorm", BF16, FP32, False),
        ("layer_norm", FP32, BF16, True),
    ]
    assert rows[1].reason.startswith("hand-written, and not recognised: its values")
    with low_precision_layernorm():
        rows = report_of(model, x).rows
    assert rows[0].reason == "hand-written: norms='hand_written' lowers it"
    assert (rows[2].lowered, rows[2].output_dtype) == (False, FP32)
    assert rows[2].reason == "the module casts it back to float32"


@needs_library("transformers")
@pytest.mark.parametrize(
    "name", ["Llama", "Mistral", "Qwen3", "Gemma3Text", "Olmo2", "DeepseekV3", "T5", "Mamba"]
)
def test_norms_of_transformers_models_are_lowered(name):
    """Each one, with their own classes; a training step runs and has finite gradients."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    if name == "T5":
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        sizes |= {"vocab_size": 99, "decoder_start_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes)
    auto = transformers.AutoModelForSeq2SeqLM if name == "T5" else transformers.AutoModelForCausalLM
    model, tokens = auto.from_config(config), torch.randint(99, (2, 8))
    batch = {"input_ids": tokens, "labels": tokens}
    with low_precision_layernorm(norms="all"), autocast():
        rows = report(model, **batch).rows
        model(**batch).loss.backward()
    assert len(rows) >= 3
    assert all(row.lowered for row in rows), [row for row in rows if not row.lowered]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@needs_library("transformers")
def test_kernel_of_the_hub_is_not_ours():
    """A forward that is bound to a module, as `kernels` binds one, runs; without it, ours does."""
    from transformers.integrations import use_kernel_forward_from_hub

    ran = []

    @use_kernel_forward_from_hub("RMSNorm")
    class HubRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    class Kernel(nn.Module):
        def forward(self, hidden_states):
            ran.append(self)
            return hidden_states * self.weight

    module, x = HubRMSNorm(), torch.randn(4, 8)
    with low_precision_layernorm(norms="all"):
        assert run(module, x).dtype is BF16
        module.forward = types.MethodType(Kernel.forward, module)
        assert torch.equal(run(module, x), x * module.weight)
    assert ran == [module]


def test_names_and_errors_know_hand_written(monkeypatch):
    """status names it, "all" includes it, and the default does not."""
    lpln.enable("bf16", norms="all")
    assert lpln.status().norms[-1] == "hand_written"
    lpln.enable("bf16")
    assert lpln.status().norms == ("layer_norm",)
    monkeypatch.setenv("LPLN_NORMS", "hand_written")
    lpln.enable("bf16")
    assert lpln.status().norms == ("hand_written",)
    assert lpln.status().installed
    with pytest.raises(ValueError, match="hand_written"):
        lpln.enable("bf16", norms="by_hand")
