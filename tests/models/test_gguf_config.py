"""GGUF metadata: what they mean, and what is refused, by the name of the key."""

from __future__ import annotations

from typing import Any

import pytest

from base.errors import InputError
from models.config import HEAD, ModelConfig, Rope
from models.config_gguf import from_gguf
from models.presets import PRESETS
from models.rope import frequencies
from weights.formats.gguf_names import ARCHITECTURES

SIZES = {
    "block_count": 4,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 9.999999974752427e-07,  # 1e-6 as float32
    "vocab_size": 100,
}
NAMES = (HEAD, *(f"model.layers.{i}.mlp.gate.weight" for i in range(4)))
FACTORS = [1.0 + i for i in range(8)]


def read(name: str = "llama", names: tuple[str, ...] = NAMES, **more: Any) -> ModelConfig:
    """Of the keys with `__` for a dot; names with a capital are other keys, as they stand."""
    values: dict[str, Any] = {"general.architecture": name}
    values |= {f"{name}.{key}": value for key, value in SIZES.items()}
    for key, value in more.items():
        values[key if key in OTHERS else f"{name}.{key.replace('__', '.')}"] = value
    return from_gguf(values, names, "here")


OTHERS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight",
          "tokenizer.ggml.tokens", "general.architecture")  # fmt: skip


def test_plain() -> None:
    assert read() == ModelConfig(64, 4, 4, 2, 16, 96, 100, 128, norm_eps=1e-6)
    assert read(**dict[str, Any]({"tokenizer.ggml.tokens": ["a"] * 7})).vocab_size == 7
    assert read(names=()).tie_embeddings
    assert read(attention__key_length=24, attention__value_length=24).head_dim == 24


def test_numbers_are_those_that_were_written() -> None:
    """They are stored as float32."""
    config = read("granite", residual_scale=0.2199999988079071, attention__scale=0.0078125,
                  embedding_scale=12.0, logit_scale=8.0)  # fmt: skip
    assert (config.residual_scale, config.attention_scale) == (0.22, 0.0078125)
    assert (config.embedding_scale, config.logits_scale) == (12.0, 1 / 8)


def test_one_value_for_each_layer() -> None:
    lists: dict[str, Any] = {"feed_forward_length": [96] * 4, "attention__head_count_kv": [2] * 4}
    assert read(**lists) == read()
    for key in lists:
        with pytest.raises(InputError, match=rf"here: .*{key.split('__')[-1]} is \[1, 2\]"):
            read(**dict[str, Any]({key: [1, 2]}))


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope__freq_base": 500000.0}, Rope(500000.0)),
        ({"rope__dimension_count": 16}, Rope()),
        ({"rope__dimension_count": 8}, Rope(dim=8)),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, Rope()),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            Rope(kind="linear", factor=4.0),
        ),
        ({"rope__scaling__factor": 4.0}, Rope(kind="linear", factor=4.0)),
        ({"rope__scale_linear": 4.0}, Rope(kind="linear", factor=4.0)),
        ({"rope__scaling__factor": 0.0}, Rope()),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
             "rope__scaling__original_context_length": 32, "rope__scaling__yarn_beta_slow": 2.0,
             "rope__scaling__attn_factor": 0.5},
            Rope(kind="yarn", factor=4.0, original_max_seq_len=32, beta_slow=2.0,
                 attention_factor=0.5 * (1 + 0.1 * 1.3862943611198906)),
        ),
        (
            {"rope_freqs.weight": FACTORS},
            Rope(kind="longrope", original_max_seq_len=128, short_factors=tuple(FACTORS),
                 long_factors=tuple(FACTORS)),
        ),
        (
            {"rope_factors_short.weight": [1.0] * 8, "rope_factors_long.weight": FACTORS,
             "rope__scaling__attn_factor": 1.25, "rope__scaling__original_context_length": 32},
            Rope(kind="longrope", original_max_seq_len=32, short_factors=(1.0,) * 8,
                 long_factors=tuple(FACTORS), attention_factor=1.25),
        ),
    ],
)  # fmt: skip
def test_rope(keys: dict[str, Any], rope: Rope) -> None:
    assert read(**keys).rope == rope


@pytest.mark.parametrize(
    ("name", "keys", "length"),
    [
        ("llama", {"rope__scaling__factor": 4.0}, 512),
        ("llama", {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, 128),
        ("llama", {"rope_freqs.weight": FACTORS}, 128),
        ("qwen2", {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, 512),
        (
            "qwen2",
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
             "rope__scaling__original_context_length": 32},
            128,
        ),
        ("gemma3", {"rope__scaling__factor": 8.0}, 128),  # these files have the stretched length
    ],
)  # fmt: skip
def test_stretched_contexts(name: str, keys: dict[str, Any], length: int) -> None:
    assert read(name, **keys).max_seq_len == length


def test_what_llama_cpp_takes_for_absent_keys() -> None:
    gemma = read("gemma2")
    assert (gemma.attention_cap, gemma.logits_cap, gemma.window) == (50.0, 30.0, 4096)
    gemma = read("gemma3")
    assert gemma.local_rope is not None
    assert (gemma.rope.theta, gemma.local_rope.theta, gemma.logits_cap) == (10000.0, 10000.0, 0.0)
    with pytest.raises(InputError, match=r"rope\.global\.freq_base=1000000\.0 is not supported"):
        read("gemma3", rope__global__freq_base=1e6)
    granite = read("granite", logit_scale=4.0)
    assert (granite.embedding_scale, granite.residual_scale) == (1.0, 1.0)
    assert granite.attention_scale == 0.0  # that of the head's size
    experts: dict[str, Any] = {"expert_count": 4, "expert_used_count": 2}
    assert read("qwen3moe", **experts).expert_dim == 48
    assert read("llama", **experts).expert_dim == 96


def test_windows() -> None:
    assert read("phi3", attention__sliding_window=7).window == 7
    assert read("phi3", attention__sliding_window=7).windowed == ()
    assert read("phi3", attention__sliding_window=0).window == 0
    assert (read("gemma2").window, read("gemma2").windowed) == (4096, (0, 2))
    assert read("gemma3", attention__sliding_window=5, block_count=8).windowed == (0, 1, 2, 3, 4, 6, 7)
    keys: dict[str, Any] = {"attention__sliding_window": 5, "attention__sliding_window_pattern": 3}
    assert read("gemma3", **keys).windowed == (0, 1, 3)
    keys["attention__sliding_window_pattern"] = [False, True, True, False]
    assert read("gemma3", **keys).windowed == (1, 2)
    assert read("smollm3", block_count=9).no_rope == (3, 7)


def test_the_largest_gemmas_scale_queries_by_the_width_of_a_head() -> None:
    for preset, name, layers in (("gemma-2-27b", "gemma2", 46), ("gemma-3-27b", "gemma3", 62)):
        wanted = PRESETS[preset]
        config = read(
            name, (), block_count=layers, embedding_length=wanted.dim,
            context_length=wanted.max_seq_len,
            attention__head_count=wanted.num_heads, attention__head_count_kv=wanted.num_kv_heads,
            attention__key_length=wanted.head_dim, attention__value_length=wanted.head_dim,
            feed_forward_length=wanted.ffn_dim, vocab_size=wanted.vocab_size,
            attention__sliding_window=wanted.window, rope__freq_base=wanted.rope.theta,
            rope__scaling__factor=wanted.rope.factor,
        )  # fmt: skip
        assert config == wanted


def test_experts() -> None:
    keys: dict[str, Any] = {"expert_count": 4, "expert_used_count": 2}
    config = read(**keys)
    assert (config.num_experts, config.experts_per_token, config.expert_dim) == (4, 2, 96)
    assert config.norm_topk and config.dense_layers == ()
    config = read("qwen3moe", NAMES[:3], expert_feed_forward_length=32, **keys)
    assert (config.expert_dim, config.dense_layers) == (32, (2, 3))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"general.architecture": "gptj"}, "'gptj' is not supported; supported: llama, "),
        ({"general.architecture": ["llama"]}, "is not supported"),
        ({"block_count": "two"}, "block_count must be an integer"),
        ({"block_count": 1 << 62}, r"block_count must be below 2\^48"),
        ({"block_count": 1 << 40}, "block_count=.* must be from 0 to"),
        ({"block_count": 0}, "num_layers=0"),
        ({"embedding_length": None}, "embedding_length must be an integer"),
        ({"attention__head_count": 0}, "num_heads=0"),
        ({"attention__head_count": -4}, "num_heads=-4"),
        ({"attention__head_count_kv": 3}, "not a multiple of num_kv_heads=3"),
        ({"attention__value_length": 8}, "attention.value_length=8 is not supported; supported: 16"),
        (
            {"attention__layer_norm_rms_epsilon": float("nan")},
            "layer_norm_rms_epsilon must be a number",
        ),
        ({"attention__causal": False}, "attention.causal=False"),
        ({"attention__clamp_kqv": 8.0}, "attention.clamp_kqv=8.0"),
        ({"logit_scale": 8.0}, "logit_scale=8.0"),
        ({"tokenizer.ggml.tokens": 5}, "tokenizer.ggml.tokens must be a list"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"rope__dimension_count": 7}, "rotary dim=7"),
        ({"rope__freq_base": "big"}, "rope.freq_base must be a number"),
        ({"rope__freq_base": float("inf")}, "rope.freq_base must be a number"),
        ({"rope__freq_base": 1.0}, "a rotary base of 1: it must be above 1"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 1e9},
            "factor=1e.09: it must be betw",
        ),
        ({"rope__scaling__type": "dynamic"}, "'dynamic' is not supported; supported: none, linear"),
        ({"rope__scaling__type": 3}, "rotary scaling 3"),
        ({"rope__scaling__type": "longrope"}, "needs the tensor rope_factors_long.weight"),
        ({"rope__scaling__type": "yarn", "rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_mult"),
        ({"rope__scaling__factor": 2.0, "rope_freqs.weight": FACTORS}, "by 2 together with a factor"),
        ({"rope_freqs.weight": FACTORS[1:]}, "7 short factors; 8 frequencies"),
        ({"rope_freqs.weight": [0.0] * 8}, "rope_freqs.weight must be a list of numbers above 0"),
        ({"rope_factors_long.weight": FACTORS}, "rope_factors_short.weight is missing"),
        ({"expert_count": 1 << 40}, "expert_count=.* must be from 0 to"),
        ({"expert_count": 4}, "expert_used_count is missing"),
        ({"expert_count": 4, "expert_used_count": 5}, "experts_per_token=5"),
        ({"expert_count": 4, "expert_used_count": 2, "expert_gating_func": 2}, "expert_gating_func=2"),
        ({"attention__sliding_window": -1}, "attention.sliding_window=-1"),
        (
            {"attention__sliding_window": 4, "attention__sliding_window_pattern": [True]},
            "for each of 4",
        ),
        ({"attention__sliding_window": 4, "attention__sliding_window_pattern": "x"}, "an integer"),
    ],
)
def test_refused_by_name(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=f"^here.*{match}"):
        read(**keys)


ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 1 << 40, 1 << 63, 0.0, -2.5, 1e-320, 1e308, float("nan"),
    float("inf"), "", "yarn", [], [1], [1, 2], ["x"], [[1]], [float("nan")] * 8, [1e308] * 8, {},
)  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_value_of_any_key(name: str) -> None:
    """A model, or a message."""
    keys = {
        *SIZES, "attention.key_length", "attention.value_length", "attention.scale", "vocab_size",
        "attention.sliding_window", "attention.sliding_window_pattern", "attn_logit_softcapping",
        "final_logit_softcapping", "expert_count", "expert_used_count", "expert_weights_norm",
        "expert_feed_forward_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast", "rope.freq_base_swa", "embedding_scale", "logit_scale",
    }  # fmt: skip
    base: dict[str, Any] = {"general.architecture": name, f"{name}.rope.scaling.factor": 2.0}
    base |= {f"{name}.{key}": value for key, value in SIZES.items()}
    base |= {f"{name}.expert_used_count": 1, f"{name}.attention.sliding_window": 4}
    base |= {f"{name}.attention.layer_norm_epsilon": 1e-5}  # Falcon's
    said: set[str] = set()
    read_as: set[ModelConfig] = set()
    for key in {f"{name}.{key}" for key in keys} | set(OTHERS):
        for kind in ("linear", "yarn"):
            for value in ODD:
                values = base | {f"{name}.rope.scaling.type": kind, key: value}
                try:
                    config = from_gguf(values, NAMES, "here")
                except InputError as error:
                    said.add(str(error))
                    continue
                if config.head_dim < 1 << 12:  # others do not fit the weights' shapes
                    assert len(frequencies(config.rope, config.head_dim, 4)) <= config.head_dim // 2
                    read_as.add(config)
    assert len(said) > 50 and len(read_as) > 5
