"""Small random models of multimodal classes around a text model, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.families import make as make_text

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **TOWER}
IMAGE = {"image_token_index": 300, "vision_config": CLIP}
AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
}
# model_type: (the family inside, what else its configuration wants)
NESTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {"vision_config": TOWER, "mm_tokens_per_image": 4, "image_token_index": 300}),
    "mistral3": (
        "mistral",
        {"vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 16}, "image_token_index": 300},
    ),
    "llava": ("llama", IMAGE),
    "llava_next": ("mistral", IMAGE),
    "llava_next_video": ("llama-biases", {**IMAGE, "video_token_index": 299}),
    "llava_onevision": (
        "qwen2",
        {**IMAGE, "video_token_index": 299,
         "vision_config": {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}},
    ),
    "vipllava": ("llama", {**IMAGE, "vision_feature_layers": [-1]}),
    "video_llava": ("llama", {**IMAGE, "video_token_index": 299}),
    "internvl": (
        "qwen3",
        {"vision_config": {**TOWER, "image_size": [32, 32], "patch_size": [16, 16]},
         "image_token_id": 300},
    ),
    "idefics3": ("llama", {"vision_config": TOWER, "image_token_id": 300, "scale_factor": 1}),
    "smolvlm": ("llama-yarn", {"vision_config": TOWER, "image_token_id": 300, "scale_factor": 1}),
    "qwen2_audio": ("qwen2-window", {"audio_config": AUDIO, "audio_token_index": 300}),
}  # fmt: skip


def make(kind: str, **changes: Any) -> Any:
    """A model of transformers in evaluation mode; the same at every call. `changes` to its config."""
    import transformers

    family, more = NESTED[kind]
    text = make_text(family)
    values = {"text_config": text.config.to_dict(), "pad_token_id": None, **more, **changes}
    values.setdefault("tie_word_embeddings", text.config.tie_word_embeddings)
    config = transformers.CONFIG_MAPPING[kind](**values)
    torch.manual_seed(0)
    name = type(config).__name__.replace("Config", "ForConditionalGeneration")
    model = getattr(transformers, name)(config).eval()
    own = dict(model.named_parameters())
    table = "embed_tokens.weight"
    prefix = next(name for name in own if name.endswith(table)).removesuffix(table)
    with torch.no_grad():
        for name, value in text.named_parameters():
            head = name.startswith("lm_head.")
            own[name if head else prefix + name.removeprefix("model.")].copy_(value)
    return model


def save(kind: str, folder: Path, **changes: Any) -> Any:
    model = make(kind, **changes)
    model.save_pretrained(folder)
    return model
