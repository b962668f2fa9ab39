"""Small random models of families that Yoke has no code for, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from comm.group import Group
from models.hf.model import HfModel, build_model, fill_model
from weights.formats.safetensors_io import open_safetensors
from weights.locate import locate

COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 301,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# (config's class, query heads, KV heads, width of the MLP, what else is special)
FAMILIES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "cohere": ("CohereConfig", 5, 1, 101, {"use_qk_norm": True, "logit_scale": 1.0}),
    "cohere2": ("Cohere2Config", 6, 2, 96, {**WINDOWS, "logit_scale": 1.0}),
    "olmo2": ("Olmo2Config", 9, 3, 101, {"rope_parameters": YARN}),
    "glm4": ("Glm4Config", 6, 2, 90, {"attention_bias": True}),
    "starcoder2": ("Starcoder2Config", 5, 1, 77, {"sliding_window": 7, "use_bias": True}),
    "exaone4": ("Exaone4Config", 9, 3, 128, {**WINDOWS, "rope_parameters": LLAMA3}),
    "gpt-neox": ("GPTNeoXConfig", 6, 6, 100, {}),
    "granite-swa": ("GraniteSWAConfig", 6, 2, 64, {**WINDOWS, "logits_scaling": 2.0}),
    "vaultgemma": ("VaultGemmaConfig", 6, 2, 64, {**WINDOWS, "attn_logit_softcapping": 3.0}),
    "minicpm3": ("MiniCPM3Config", 5, 5, 64, {
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 12,
    }),
}  # fmt: skip


def make(name: str, **changes: Any) -> Any:
    """A model of transformers in evaluation mode; the same at every call."""
    import transformers

    kind, heads, kv_heads, ffn, more = FAMILIES[name]
    values = COMMON | {
        "hidden_size": heads * 16,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "intermediate_size": ffn,
    }
    values |= more | changes
    if name == "minicpm3":
        del values["head_dim"]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # what starts at zero or one would hide mistakes
        for _, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.3)
    return model.eval()


def save(name: str, folder: Path, **changes: Any) -> Any:
    model = make(name, **changes)
    model.save_pretrained(folder)
    return model


def load_hf(folder: Path, group: Group) -> HfModel:
    """This rank's part of the model in a folder, in float32."""
    checkpoint = open_safetensors(locate(folder), translated=False)
    return fill_model(*build_model(folder, group, torch.float32), checkpoint, group)


def add_tokenizer(folder: Path) -> None:
    """A token for every byte, beside a checkpoint: enough to run the command on it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
