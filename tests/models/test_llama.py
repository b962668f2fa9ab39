"""The model against the transformers library, on small random checkpoints that it saved itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.errors import InputError
from comm.group import Group
from models.config import ModelConfig, expected_shapes
from models.config_gguf import from_gguf
from models.config_hf import from_hf
from models.load import config_of, load_model
from models.presets import PRESETS
from models.reference import generate
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "mqa": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12},
    "tied": {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True},
}


def save_hf(folder: Path, shape: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = shape["num_attention_heads"]
    config = LlamaConfig(
        hidden_size=heads * 16,
        intermediate_size=112,
        num_hidden_layers=3,
        vocab_size=301,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
        **{"rope_theta": 5000.0, **shape},
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    hf = save_hf(tmp_path, SHAPES[shape])
    checkpoint = open_checkpoint(tmp_path)
    model = load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)
    tokens = torch.randint(0, 301, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = hf(tokens).logits
        model.setup(3, 40)
        # A prompt of 10, its padding to 16, then token by token over the padding.
        padded = torch.cat([tokens[:, :10], torch.zeros(3, 6, dtype=torch.int64)], dim=1)
        logits = model(padded, torch.arange(16), torch.tensor([9]))
        torch.testing.assert_close(logits, wanted[:, 9], rtol=2e-4, atol=2e-4)
        for i in range(10, 24):
            logits = model(tokens[:, i : i + 1], torch.tensor([i]))
            torch.testing.assert_close(logits, wanted[:, i], rtol=2e-4, atol=2e-4)
        made = hf.generate(
            tokens[:1], attention_mask=torch.ones(1, 24), max_new_tokens=12, do_sample=False
        )
    assert generate(model, Group(0, 1), tokens[0].tolist(), 12) == made[0, 24:].tolist()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_hf(tmp_path, SHAPES["gqa"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    config = config_of(open_checkpoint(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(changed: dict[str, torch.Tensor], match: str) -> None:
        save_file(changed, file)
        with pytest.raises(InputError, match=match):
            load_model(config, open_checkpoint(tmp_path), Group(0, 1), torch.float32)

    refused({key: x for key, x in tensors.items() if key != name}, f"lacks 1 weights.*{name}")
    refused({**tensors, "model.extra": torch.zeros(1)}, "does not have.*model.extra.*model.safetens")
    refused(
        {**tensors, name: tensors[name][:-1].clone()},
        rf"model.safetensors: {name} has shape \(111, 96\)",
    )


HF = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not supported"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "8 frequencies",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number above 0"),
        ({"head_dim": 15}, "even size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers must be an integer"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_act": "relu"}, "'relu' is not supported"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_a_config_that_is_not_supported_is_refused(change: dict[str, Any], match: str) -> None:
    assert from_hf(HF, "here") == ModelConfig(64, 2, 4, 4, 16, 128, 100, 2048, norm_eps=1e-6)
    with pytest.raises(InputError, match=match):
        from_hf({**HF, **change}, "here")


def test_the_embedded_file_declares_the_preset(gguf: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    assert config_of(checkpoint) == PRESETS["smollm2-135m"]
    scaled = {**checkpoint.config, "llama.rope.scaling.type": "dynamic"}
    with pytest.raises(InputError, match="dynamic"):
        from_gguf(scaled, checkpoint.entries, "here")


def test_a_rank_holds_its_share_only() -> None:
    config = PRESETS["tiny"]
    weights = random_checkpoint(expected_shapes(config), seed=0)
    whole = sum(p.numel() for p in load_model(config, weights, Group(0, 1), torch.float32).parameters())
    part = sum(p.numel() for p in load_model(config, weights, Group(1, 2), torch.float32).parameters())
    assert part < 0.52 * whole


def test_config_json_of_saved_model_is_read(tmp_path: Path) -> None:
    save_hf(tmp_path, SHAPES["mqa"])
    config = config_of(open_checkpoint(tmp_path))
    assert (config.head_dim, config.rope.theta, config.num_kv_heads) == (12, 5000.0, 1)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="JSON object"):
        open_checkpoint(tmp_path)
