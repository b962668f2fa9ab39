"""Of which class a model is, and a multimodal class around a text model as that text model: its config,
and its weights by name. Pure; free of torch.

A nested config.json holds that of the text model as `text_config`, and the file stores its weights
behind a prefix, beside those of towers for images or sound. With text alone these classes compute what
their text model does, so that is what is run; the towers are left out, by name. `WRAPPERS` lists the
classes of which this is known (tests/models/test_nested.py compares them with transformers).

What is not here: classes of which that does not hold: PaliGemma's prompts see both ways, Mllama has
layers of its own for images, Granite Speech adapts weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from base.errors import InputError

T = TypeVar("T")

# By `model_type`, the class of a text model.
TEXT_MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gptj": "GPTJForCausalLM",
    "falcon": "FalconForCausalLM",
}


@dataclass(frozen=True)
class Wrapper:
    """What holds of a class where its config.json is silent: the `model_type` of its text model,
    whether the head is the embedding, and other keys of the text model."""

    text: str
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


# By `model_type`, as transformers has them.
WRAPPERS = {
    "gemma3": Wrapper("gemma3_text", tied=True),
    "mistral3": Wrapper("mistral", tied=True),
    "llava": Wrapper("llama"),
    "llava_next": Wrapper("llama"),
    "llava_next_video": Wrapper("llama"),
    "llava_onevision": Wrapper("qwen2"),
    "vipllava": Wrapper("llama"),
    "video_llava": Wrapper("llama"),
    "internvl": Wrapper("qwen2", tied=True),
    "idefics3": Wrapper("llama", defaults={"rms_norm_eps": 1e-5}),
    "smolvlm": Wrapper("llama", defaults={"rms_norm_eps": 1e-5}),
    "qwen2_audio": Wrapper("qwen2"),
}
_TEXT = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?P<rest>.+)")
_ROOTS = ("model.", "lm_head.", "transformer.")


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class of a config.json with an LM head: by `model_type`, which decides in transformers, or
    else by `architectures`. A base model without a head counts as the class that has one. None where
    neither says."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    kind = config.get("model_type")
    own = TEXT_MODELS.get(kind) if isinstance(kind, str) else None
    known = isinstance(name, str) and name in TEXT_MODELS.values()
    stem = "" if own is None else own.removesuffix("ForCausalLM")
    if own is not None and (not names or known or name in (f"{stem}Model", f"{stem}TextModel")):
        return own
    return name if known else None


def is_nested(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a class in `WRAPPERS`, with a text model inside."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS and isinstance(config.get("text_config"), Mapping)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model alone; any other config as it is."""
    if not is_nested(config):
        return dict(config)
    wrapper, inner = WRAPPERS[config["model_type"]], config["text_config"]
    found = {"model_type": wrapper.text, **wrapper.defaults, **inner}
    kind = found["model_type"]
    found["architectures"] = [TEXT_MODELS.get(kind, kind) if isinstance(kind, str) else kind]
    tied = config.get("tie_word_embeddings")
    found["tie_word_embeddings"] = bool(wrapper.tied if tied is None else tied) or bool(
        inner.get("tie_word_embeddings")
    )
    for key in ("quantization_config", "eos_token_id", "bos_token_id", "pad_token_id"):
        if config.get(key) is not None:
            found[key] = config[key]
    return found


def text_name(stored: str) -> str | None:
    """What a weight of a nested text model would be called if the model were saved alone; None for one
    of a tower."""
    match = _TEXT.fullmatch(stored)
    if match is None:
        return stored if stored.startswith("lm_head.") else None
    rest = match["rest"]
    return rest if rest.startswith(_ROOTS) else f"model.{rest}"


def text_weights(stored: Mapping[str, T], path: Path) -> dict[str, T]:
    """Those of the stored weights that are the text model's, under the names that they would have if it
    were saved alone. Raises InputError for two of one name."""
    found: dict[str, T] = {}
    for name, value in stored.items():
        own = text_name(name)
        if own is None:
            continue
        if own in found:
            raise InputError(
                f"{path} stores {own!r} of its text model twice, once as {name!r}; remove the files "
                "that do not belong to the model"
            )
        found[own] = value
    return found


def left_out(names: Collection[str]) -> str:
    """The towers among stored names, for a message: "vision_tower (17 tensors), ..."; "" for none."""
    towers = Counter(
        name.removeprefix("model.").partition(".")[0] for name in names if text_name(name) is None
    )
    return ", ".join(f"{tower} ({count} tensors)" for tower, count in towers.items())
