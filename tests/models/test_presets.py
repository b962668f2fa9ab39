"""Presets are the published models: their sizes, and what their own config.json says of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from base.errors import InputError
from models.config import ModelConfig, check, from_dict, override
from models.config_hf import ARCHITECTURES, from_hf
from models.families import FAMILIES, family_of
from models.hub import REPOSITORIES, Reference, choose_files, reference_of
from models.presets import PRESETS
from models.sizes import num_parameters
from tests.models.models_page import PAGE, render

# Published numbers of parameters, in units of 10^9; a tied head is not counted twice. Gemma 3 from 4B
# on: without what it sees pictures with, a tower of 0.4169 and a projector.
BILLIONS = {
    "smollm2-135m": 0.1345, "smollm2-360m": 0.3618, "smollm2-1.7b": 1.7114, "smollm3-3b": 3.0751,
    "llama-7b": 6.7384, "llama-13b": 13.0159, "llama-70b": 68.9766,
    "llama-3-8b": 8.0303, "llama-3-70b": 70.5537,
    "llama-3.1-8b": 8.0303, "llama-3.1-70b": 70.5537, "llama-3.1-405b": 405.8534,
    "llama-3.2-1b": 1.2358, "llama-3.2-3b": 3.2127,
    "mistral-7b": 7.2480, "mixtral-8x7b": 46.7028, "mixtral-8x22b": 140.6301,
    "qwen2.5-0.5b": 0.4940, "qwen2.5-1.5b": 1.5437, "qwen2.5-7b": 7.6156, "qwen2.5-14b": 14.7700,
    "qwen2.5-32b": 32.7639, "qwen2.5-72b": 72.7062,
    "qwen3-0.6b": 0.5960, "qwen3-1.7b": 1.7206, "qwen3-4b": 4.0225, "qwen3-8b": 8.1907,
    "qwen3-14b": 14.7683, "qwen3-32b": 32.7621, "qwen3-30b-a3b": 30.5321, "qwen3-235b-a22b": 235.0936,
    "phi-3-mini": 3.8211, "phi-4": 14.6595,
    "granite-3.1-2b": 2.5335, "granite-3.1-8b": 8.1708,
    "gemma-2-2b": 2.6143, "gemma-2-9b": 9.2417, "gemma-2-27b": 27.2271,
    "gemma-3-1b": 0.9999, "gemma-3-4b": 4.3001 - 0.4198, "gemma-3-12b": 12.1873 - 0.4213,
    "gemma-3-27b": 27.4324 - 0.4231,
    "gpt-j-6b": 6.0509, "falcon-7b": 6.9217, "falcon-40b": 41.3033,
}  # fmt: skip


@pytest.mark.parametrize("preset", BILLIONS)
def test_presets_have_the_published_sizes(preset: str) -> None:
    assert num_parameters(PRESETS[preset]) / 1e9 == pytest.approx(BILLIONS[preset], abs=0.0006)


def test_every_preset_is_a_model() -> None:
    assert PRESETS.keys() - BILLIONS.keys() == {"tiny"}  # which is ours
    for name, config in PRESETS.items():
        assert check(config) is config, name
        assert all(0 <= layer < config.num_layers for layer in config.windowed + config.no_rope)
        assert len(config.windowed) < config.num_layers and not config.dense_layers


LLAMA_3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def llama(architecture: str, dim: int, layers: int, heads: int, kv: int, ffn: int, vocab: int,
          length: int, theta: float, eps: float, **more: Any) -> dict[str, Any]:  # fmt: skip
    """What config.json says, in the keys that Llama has given to most."""
    return {
        "architectures": [architecture],
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        **more,
    }


def gemma(*dims: Any, **more: Any) -> dict[str, Any]:
    more |= {
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }
    return llama(*dims, **more)


QWEN3_MOE = {
    "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "sliding_window": None, "use_sliding_window": False,
    "max_window_layers": 48,
}  # fmt: skip
# The published files, in the keys that bear on what is computed.
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2-360m": llama(
        "LlamaForCausalLM", 960, 32, 15, 5, 2560, 49152, 8192, 100000, 1e-5,
        tie_word_embeddings=True, rope_interleaved=False, rope_scaling=None, mlp_bias=False,
    ),
    "llama-70b": llama(
        "LlamaForCausalLM", 8192, 80, 64, 8, 28672, 32000, 4096, 10000.0, 1e-5,
        tie_word_embeddings=False, pretraining_tp=1, rope_scaling=None,
    ),
    "llama-3.1-405b": llama(
        "LlamaForCausalLM", 16384, 126, 128, 8, 53248, 128256, 131072, 500000.0, 1e-5,
        tie_word_embeddings=False, mlp_bias=False, rope_scaling=LLAMA_3 | {"factor": 8.0},
    ),
    "llama-3.2-3b": llama(
        "LlamaForCausalLM", 3072, 28, 24, 8, 8192, 128256, 131072, 500000.0, 1e-5, head_dim=128,
        tie_word_embeddings=True, mlp_bias=False, rope_scaling=LLAMA_3 | {"factor": 32.0},
    ),
    "smollm3-3b": llama(
        "SmolLM3ForCausalLM", 2048, 36, 16, 4, 11008, 128256, 65536, 5000000.0, 1e-6,
        no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, use_sliding_window=False,
        sliding_window=None, layer_types=["full_attention"] * 36, max_window_layers=28,
        tie_word_embeddings=True,
    ),
    "mistral-7b": llama(
        "MistralForCausalLM", 4096, 32, 32, 8, 14336, 32768, 32768, 1000000.0, 1e-5,
        sliding_window=None, tie_word_embeddings=False,
    ),
    "mixtral-8x7b": llama(
        "MixtralForCausalLM", 4096, 32, 32, 8, 14336, 32000, 32768, 1000000.0, 1e-5,
        num_local_experts=8, num_experts_per_tok=2, sliding_window=None, tie_word_embeddings=False,
    ),
    "mixtral-8x22b": llama(
        "MixtralForCausalLM", 6144, 56, 48, 8, 16384, 32768, 65536, 1000000.0, 1e-5,
        num_local_experts=8, num_experts_per_tok=2, sliding_window=None, tie_word_embeddings=False,
    ),
    "qwen2.5-7b": llama(
        "Qwen2ForCausalLM", 3584, 28, 28, 4, 18944, 152064, 32768, 1000000.0, 1e-6,
        sliding_window=131072, use_sliding_window=False, max_window_layers=28,
        tie_word_embeddings=False,
    ),
    "qwen3-0.6b": llama(
        "Qwen3ForCausalLM", 1024, 28, 16, 8, 3072, 151936, 40960, 1000000, 1e-6, head_dim=128,
        attention_bias=False, sliding_window=None, use_sliding_window=False, max_window_layers=28,
        rope_scaling=None, tie_word_embeddings=True,
    ),
    "qwen3-30b-a3b": llama(
        "Qwen3MoeForCausalLM", 2048, 48, 32, 4, 6144, 151936, 40960, 1000000.0, 1e-6, head_dim=128,
        attention_bias=False, rope_scaling=None, tie_word_embeddings=False,
        moe_intermediate_size=768, **QWEN3_MOE,
    ),
    "qwen3-235b-a22b": llama(
        "Qwen3MoeForCausalLM", 4096, 94, 64, 4, 12288, 151936, 40960, 1000000.0, 1e-6, head_dim=128,
        attention_bias=False, rope_scaling=None, tie_word_embeddings=False,
        moe_intermediate_size=1536, **QWEN3_MOE,
    ),
    "phi-3-mini": llama(
        "Phi3ForCausalLM", 3072, 32, 32, 32, 8192, 32064, 4096, 10000.0, 1e-5, rope_scaling=None,
        original_max_position_embeddings=4096, sliding_window=2047, tie_word_embeddings=False,
    ),
    "phi-4": llama(
        "Phi3ForCausalLM", 5120, 40, 40, 10, 17920, 100352, 16384, 250000, 1e-5, rope_scaling=None,
        original_max_position_embeddings=16384, sliding_window=None, tie_word_embeddings=False,
    ),
    "granite-3.1-8b": llama(
        "GraniteForCausalLM", 4096, 40, 32, 8, 12800, 49155, 131072, 10000000.0, 1e-5,
        attention_multiplier=0.0078125, embedding_multiplier=12.0, residual_multiplier=0.22,
        logits_scaling=16.0, tie_word_embeddings=True, rope_scaling=None,
    ),
    "gemma-2-27b": gemma(
        "Gemma2ForCausalLM", 4608, 46, 32, 16, 36864, 256000, 8192, 10000.0, 1e-6, head_dim=128,
        query_pre_attn_scalar=144, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        sliding_window=4096,
    ),
    "gemma-3-1b": gemma(
        "Gemma3ForCausalLM", 1152, 26, 4, 1, 6912, 262144, 32768, 1000000, 1e-6, head_dim=256,
        query_pre_attn_scalar=256, attn_logit_softcapping=None, final_logit_softcapping=None,
        sliding_window=512, sliding_window_pattern=6, rope_local_base_freq=10000, rope_scaling=None,
    ),
    # The text_config of a file that describes pictures, too.
    "gemma-3-27b": gemma(
        "Gemma3ForCausalLM", 5376, 62, 32, 16, 21504, 262208, 131072, 1000000.0, 1e-6, head_dim=128,
        query_pre_attn_scalar=168, sliding_window=1024, sliding_window_pattern=6,
        rope_local_base_freq=10000.0, rope_scaling={"factor": 8.0, "rope_type": "linear"},
    ),
    "gpt-j-6b": {
        "architectures": ["GPTJForCausalLM"], "n_embd": 4096, "n_layer": 28, "n_head": 16,
        "n_inner": None, "n_positions": 2048, "rotary_dim": 64, "rotary": True, "vocab_size": 50400,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    },
    "falcon-7b": {
        "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "num_hidden_layers": 32,
        "num_attention_heads": 71, "multi_query": True, "parallel_attn": True, "bias": False,
        "alibi": False, "new_decoder_architecture": False, "vocab_size": 65024,
        "layer_norm_epsilon": 1e-5,
    },
    "falcon-40b": {
        "architectures": ["FalconForCausalLM"], "hidden_size": 8192, "num_hidden_layers": 60,
        "num_attention_heads": 128, "num_kv_heads": 8, "parallel_attn": True, "bias": False,
        "alibi": False, "new_decoder_architecture": True, "vocab_size": 65024,
        "layer_norm_epsilon": 1e-5,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_file_says_the_preset(preset: str) -> None:
    assert family_of(preset).hf == PUBLISHED[preset]["architectures"][0]
    assert from_hf(PUBLISHED[preset], "here") == PRESETS[preset]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_so_does_the_file_that_transformers_writes_today(preset: str) -> None:
    """Newer keys for the same: one object of rotary settings, a type for each layer."""
    import transformers

    published = PUBLISHED[preset]
    name = published["architectures"][0].removesuffix("ForCausalLM")
    name = "Gemma3Text" if name == "Gemma3" else name
    written = json.loads(
        getattr(transformers, f"{name}Config")(**published).to_json_string(use_diff=False)
    )
    assert from_hf(written, "here") == PRESETS[preset]


def test_every_family_has_a_published_file() -> None:
    assert {family_of(preset) for preset in PUBLISHED} == set(FAMILIES)
    assert {file["architectures"][0] for file in PUBLISHED.values()} == set(ARCHITECTURES)


def test_a_config_survives_json() -> None:
    from dataclasses import asdict

    for config in PRESETS.values():
        assert from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_overrides() -> None:
    assert override(PRESETS["llama-7b"], num_layers=2, dim=None).num_layers == 2
    assert override(PRESETS["llama-7b"], num_heads=16, num_kv_heads=16).head_dim == 256
    for change, match in (({"num_layers": 0}, "num_layers=0"), ({"dim": 100}, "dim=100")):
        with pytest.raises(InputError, match=match):
            override(PRESETS["llama-7b"], **change)
    assert isinstance(override(PRESETS["tiny"]), ModelConfig)


def test_every_preset_is_in_a_repository_of_its_own() -> None:
    assert set(REPOSITORIES) == set(PRESETS) - {"tiny"}
    assert len(set(REPOSITORIES.values())) == len(REPOSITORIES)
    for preset, repository in REPOSITORIES.items():
        assert reference_of(preset) == Reference(repository) == reference_of(repository)
        size = re.search(r"-(\d+(?:\.\d+)?)(b|m)\b", preset)  # the name says the same size
        assert size is None or f"{size[1]}{size[2]}" in repository.lower()


def test_what_a_word_means_on_the_hub() -> None:
    assert reference_of("o/n:q4") == Reference("o/n", "q4")
    assert reference_of("o/n:a/b-*.gguf") == Reference("o/n", "a/b-*.gguf")
    for word in (
        "tiny",
        "n",
        "o/n:",
        "/o/n",
        "./n",
        "~/n",
        "o/n/m",
        "a/../b",
        "o/n o",
        "../n",
        "o..x/n",
    ):
        assert reference_of(word) is None, word


def test_files_that_a_model_needs() -> None:
    own = Reference("o/n")
    small = ["config.json", "tokenizer.json"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"

    def chosen(*names: str) -> tuple[set[str], set[str], str]:
        found = choose_files([*small, *names, "README.md", "adapter_model.safetensors", "x/y.bin"], own)
        return set(found.small) - set(small), set(found.weights), found.index

    assert chosen(*shards, index) == ({index}, set(shards), index)
    assert chosen(*shards) == (set(), set(shards), "")
    assert chosen("model.safetensors", "pytorch_model.bin") == (set(), {"model.safetensors"}, "")
    assert chosen("model.safetensors", index) == (set(), {"model.safetensors"}, "")
    assert chosen("nn.safetensors", "consolidated.safetensors")[1] == {"nn.safetensors"}
    assert chosen("pytorch_model.bin", "pytorch_model.bin.index.json")[1] == {"pytorch_model.bin"}
    parts = [name.replace("model-", "pytorch_model-").replace("safetensors", "bin") for name in shards]
    assert chosen(*parts, "tf_model.h5")[1] == set(parts)
    meta = ["consolidated.00.pth", "consolidated.01.pth"]
    assert chosen(*meta, "params.json") == ({"params.json"}, set(meta), "")
    assert choose_files(["config.json", "m.gguf"], own).weights == ("m.gguf",)
    with pytest.raises(
        InputError, match=r"could mean 2 GGUF files: a\.gguf, b\.gguf; name one, such as o/n"
    ):
        choose_files(["a.gguf", "b.gguf"], own)
    with pytest.raises(InputError, match="o/n on the hub holds no weights in a format that Yoke reads"):
        choose_files([*small, "flax_model.msgpack"], own)


def test_the_page_of_models_is_what_the_code_says() -> None:
    """docs/models.md is made by `python -m tests.models.models_page`."""
    assert PAGE.read_text(encoding="utf-8") == render()
