"""The class of a model, and the text model inside a multimodal class: its config, and its weights by
name. Pure; free of torch.

A nested config.json holds the text model's config as `text_config`. The files store its weights under
a prefix, beside the weights of towers for images or sound. On text alone these classes compute the
same as their text model, so only the text model is run, and the towers are left out by name.
`WRAPPERS` lists the classes for which this is known to be true (tests/models/test_nested.py compares
them with transformers).

What is not here: classes for which it is not true: PaliGemma attends to its prompt in both directions,
Mllama has extra layers for images, Granite Speech adapts weights.
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

# `model_type` -> the class of a text model.
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
    """The defaults of a class for keys that its config.json omits: `text` is the `model_type` of its
    text model, `tied` whether the head is the embedding, `defaults` other keys of the text model."""

    text: str
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


# `model_type` -> defaults, as in transformers.
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
    """The class, with an LM head, of the model of a config.json: by `model_type`, which also decides
    in transformers, or else by `architectures`. A base model without a head counts as the class with
    one. None if neither key names a known class."""
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
    """Whether a config.json is of a class in `WRAPPERS`, with a text model inside."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS and isinstance(config.get("text_config"), Mapping)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model alone; a config that is not nested is returned unchanged."""
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
    """The name that a weight of a nested text model would have if that model were saved alone; None for
    a weight of a tower."""
    match = _TEXT.fullmatch(stored)
    if match is None:
        return stored if stored.startswith("lm_head.") else None
    rest = match["rest"]
    return rest if rest.startswith(_ROOTS) else f"model.{rest}"


def text_weights(stored: Mapping[str, T], path: Path) -> dict[str, T]:
    """The stored weights of the text model, under the names that they would have if it were saved
    alone. Raises InputError if two have the same name."""
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
