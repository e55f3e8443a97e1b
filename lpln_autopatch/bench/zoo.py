"""The zoo: full-size models as people train them, and any other model by name."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from lpln_autopatch.bench.batches import batch_of
from lpln_autopatch.bench.contenders import STOCK
from lpln_autopatch.bench.results import Row, short


class WrongModel(Exception):
    """A model cannot be made; the message is a line that says why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model with its batch."""

    source: str  # "timm:NAME", "transformers:CONFIG" or "MODULE:FUNCTION"
    batch: int = 32  # items
    length: int = 512  # tokens of an item, where it is text
    config: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # where it differs from defaults
    # The configuration of few layers, for compiled code; empty: the whole model is compiled.
    shallow: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norms: str = "layer_norm"  # the norms that contenders lower

    def build(self, device: str | torch.device = "meta") -> torch.nn.Module:
        """Return the model, by default on meta, where its weights take no memory.

        Raises:
            WrongModel: it cannot be made.
        """
        library, _, name = self.source.partition(":")
        try:
            with torch.device(device):
                if library == "timm":
                    model: torch.nn.Module = import_module("timm").create_model(name, **self.config)
                elif library == "transformers":
                    model = _of_transformers(name, self.config)
                else:
                    model = getattr(import_module(library), name)(**self.config)
        except ModuleNotFoundError as error:
            why = f"{error.name} is not installed: pip install 'lpln_autopatch[count]'"
            if error.name not in (None, "timm", "transformers", "diffusers", "open_clip"):
                why = f"there is no module {error.name!r} in this folder, nor on PYTHONPATH"
            # transformers names no package where one of its own modules cannot be imported.
            why = why if error.name else str(error).splitlines()[0]
            raise WrongModel(f"{self.source}: {why}") from error
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise WrongModel(f"{self.source}: {str(error).splitlines()[0]}") from error
        if not isinstance(model, torch.nn.Module):
            raise WrongModel(f"{self.source} gives {type(model).__name__}, not a torch.nn.Module")
        return model.train()

    def batch_on(self, model: torch.nn.Module, device: str | torch.device) -> dict[str, Any]:
        """Return the arguments of the forward of `model` by name, on `device`."""
        return batch_of(model, self.batch, self.length, device)


def _words(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _words(value)
        else:
            yield f"{name} {value}"


def _of_transformers(name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    transformers = import_module("transformers")
    kind = getattr(transformers, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, transformers.PretrainedConfig):
        raise WrongModel(f"transformers:{name} is not a configuration of transformers")
    tasks = ("SpeechSeq2Seq", "Seq2SeqLM", "MaskedLM", "CausalLM", "ImageClassification")
    for auto in (
        *(getattr(transformers, f"AutoModelFor{t}") for t in tasks),
        transformers.AutoModel,
    ):
        if kind in auto._model_mapping:
            configuration: Any = kind(**config)
            configuration.use_cache = False  # of keys and values, for generation
            model: torch.nn.Module = auto.from_config(configuration)
            return model
    raise WrongModel(f"transformers:{name} belongs to no model that can be made from it alone")


_HERE = "lpln_autopatch.bench.builders"
_1000 = {"num_labels": 1000}
_THREE = {"num_hidden_layers": 3}
_BOTH_THREE = {"text_config": _THREE, "vision_config": _THREE}
_CODERS_THREE = {"encoder_layers": 3, "decoder_layers": 3}
_STAGES_TWO = {"depths": (2, 2, 2, 2)}
_WHISPER = {"d_model": 768, "encoder_layers": 12, "decoder_layers": 12}
_WHISPER |= {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
_WHISPER |= {"encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
_LLAMA = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16}
_LLAMA |= {"num_attention_heads": 16}
_GROUPED = {**_LLAMA, "num_key_value_heads": 8}
_OLMO = {**_LLAMA, "intermediate_size": 8192}
_GEMMA = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
_GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
_T5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}

MODELS: dict[str, Entry] = {
    "bert-base": Entry("transformers:BertConfig", 32, 512, {}, _THREE),
    "gpt2": Entry("transformers:GPT2Config", 8, 1024, {}, {"n_layer": 3}),
    "vit-b16": Entry("transformers:ViTConfig", 64, 0, _1000, _THREE),
    "vit-b16-timm": Entry("timm:vit_base_patch16_224", 64, 0, {}, {"depth": 3}),
    "swin-t": Entry("timm:swin_tiny_patch4_window7_224", 64, 0, {}, _STAGES_TWO),
    "convnext-t": Entry("timm:convnext_tiny", 64, 0, {}, _STAGES_TWO),
    "whisper-small": Entry("transformers:WhisperConfig", 8, 448, _WHISPER, _CODERS_THREE),
    "dinov2-b": Entry("transformers:Dinov2Config", 64, 0, {**_1000, "image_size": 224}, _THREE),
    "clip-vit-b32": Entry("transformers:CLIPConfig", 256, 512, {}, _BOTH_THREE),
    "dit-xl-2": Entry(f"{_HERE}:dit_xl_2", 32, 0, {}, {"num_layers": 3}),
    "sd-unet": Entry(f"{_HERE}:stable_diffusion_unet", 8, 0, {}, {"layers_per_block": 1}, "all"),
    "llama-1b": Entry("transformers:LlamaConfig", 4, 2048, _LLAMA, _THREE, "all"),
    "mistral-1b": Entry("transformers:MistralConfig", 4, 2048, _GROUPED, _THREE, "all"),
    "qwen3-1b": Entry("transformers:Qwen3Config", 4, 2048, _GROUPED, _THREE, "all"),
    "gemma3-1b": Entry("transformers:Gemma3TextConfig", 4, 2048, _GEMMA, _THREE, "all"),
    "olmo2-1b": Entry("transformers:Olmo2Config", 4, 2048, _OLMO, _THREE, "all"),
    "t5-base": Entry("transformers:T5Config", 32, 512, _T5, {"num_layers": 3}, "all"),
    "sam2-memory": Entry(f"{_HERE}:sam2_memory_encoder", 8, norms="all"),
    "open-clip-b32": Entry(f"{_HERE}:open_clip_vit_b_32", 256, norms="all"),
}
"""The models of the default."""


_PYTHIA = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_PYTHIA |= {"intermediate_size": 4096}
_BLOOM = {"hidden_size": 1024, "n_layer": 24, "n_head": 16}
_ROBERTA = {"max_position_embeddings": 514}
_TIMM: dict[str, Mapping[str, Any]] = {
    "vit_large_patch16_224": {"depth": 3},
    "deit3_base_patch16_224": {"depth": 3},
    "eva02_base_patch14_224": {"depth": 3},
    "cait_s24_224": {"depth": 3},
    "xcit_small_12_p16_224": {"depth": 3},
    "swinv2_tiny_window8_256": _STAGES_TWO,
    "convnext_base": _STAGES_TWO,
    "maxvit_tiny_tf_224": _STAGES_TWO,
    "pvt_v2_b2": _STAGES_TWO,
    "davit_tiny": {"depths": (1, 1, 2, 1)},
    "edgenext_small": _STAGES_TWO,
    # timm takes no other depth for the following.
    "mixer_b16_224": {},
    "mvitv2_tiny": {},
    "focalnet_tiny_srf": {},
}

MORE: dict[str, Entry] = {
    "roberta-base": Entry("transformers:RobertaConfig", 32, 512, _ROBERTA, _THREE),
    "distilbert": Entry("transformers:DistilBertConfig", 32, 512, {}, {"n_layers": 3}),
    "electra-small": Entry("transformers:ElectraConfig", 64, 512, {}, _THREE),
    "opt-125m": Entry("transformers:OPTConfig", 8, 1024, {}, _THREE),
    "pythia-410m": Entry("transformers:GPTNeoXConfig", 8, 1024, _PYTHIA, _THREE),
    "bloom-560m": Entry("transformers:BloomConfig", 4, 1024, _BLOOM, {"n_layer": 3}),
    "phi-1": Entry("transformers:PhiConfig", 4, 1024, {}, _THREE),
    "bart-large": Entry("transformers:BartConfig", 8, 512, {}, _CODERS_THREE),
    "beit-b16": Entry("transformers:BeitConfig", 64, 0, _1000, _THREE),
    "siglip-b16": Entry("transformers:SiglipConfig", 64, 512, {}, _BOTH_THREE),
    **{name: Entry(f"timm:{name}", 64, 0, {}, shallow) for name, shallow in _TIMM.items()},
}
"""The models that `--models all` adds to `MODELS`."""


def entries(chosen: Sequence[str]) -> dict[str, Entry]:
    """Return the models of these names or sources: `MODELS` for none, the whole zoo for "all"."""
    known = {**MODELS, **MORE}
    if list(chosen) == ["all"]:
        return known
    found: dict[str, Entry] = {}
    for name in chosen or MODELS:
        if name not in known and ":" not in name:
            valid = f"all, {', '.join(known)}, timm:NAME, transformers:CONFIG, MODULE:FUNCTION"
            raise WrongModel(f"{name!r} is no model; valid: {valid}")
        found[name] = known.get(name) or Entry(name, 64 if name.startswith("timm:") else 8)
    return found


def cases(
    options: Namespace, rows: list[Row]
) -> list[tuple[dict[str, object], Entry, torch.dtype]]:
    """Return the cases, each with the entry that builds its model, and an autocast dtype.

    Each model is built on meta first, so that a wrong model is known before any is measured. A
    default model whose package is missing adds a row to `rows` that says so.
    """
    found = []
    chosen = entries(options.models or ["bert-base"] * options.quick)
    for (name, entry), mode in itertools.product(chosen.items(), options.modes or ["eager"]):
        norms = options.norms or entry.norms
        batch = 1 if options.quick else entry.batch * (options.batches or 1)
        entry = dataclasses.replace(entry, batch=batch)
        case: dict[str, object] = {"model": name, "mode": mode, "batch": entry.batch}
        if (mode == "compiled" or options.quick) and entry.shallow:
            case["of"] = ", ".join(dict.fromkeys(_words(entry.shallow)))
            entry = dataclasses.replace(entry, config={**entry.config, **entry.shallow})
        try:
            entry.build()
        except WrongModel as error:
            if options.models:
                raise
            rows.append(Row(case, STOCK.name, reason=str(error)))
            continue
        for dtype in options.dtypes or [torch.bfloat16]:
            found.append(({**case, "autocast": short(dtype), "norms": norms}, entry, dtype))
    return found
