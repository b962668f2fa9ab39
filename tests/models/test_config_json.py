"""GGUF's metadata as the files of a Hugging Face folder: read back, they are the same model and
tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from base.errors import InputError
from models.config import ModelConfig, Rope
from models.config_hf import from_hf
from models.config_json import to_hf
from models.tokenizer.files import tokenizer_files
from models.tokenizer.open import load_codec
from tests.models.vocabularies import SPECIAL, TEXTS, gguf_of, train_bytes
from weights.checkpoint import Checkpoint
from weights.open import open_checkpoint

BASE = ModelConfig(
    dim=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=40,
    max_seq_len=512, norm_eps=1e-5,
)  # fmt: skip
FACTORS = tuple(1.0 + i for i in range(8))
GEMMA = replace(
    BASE, block="gemma", norm="rms1p", activation="gelu_tanh", tie_embeddings=True, embedding_scale=8.0,
    attention_scale=24**-0.5, window=7,
)  # fmt: skip
CASES = {
    "llama": BASE,
    "llama, tied, biases": replace(
        BASE, tie_embeddings=True, attention_bias=True, attention_out_bias=True, mlp_bias=True
    ),
    "llama, llama3": replace(
        BASE,
        rope=Rope(
            5e5, kind="longrope", original_max_seq_len=512, short_factors=FACTORS, long_factors=FACTORS
        ),
    ),
    "llama, linear": replace(BASE, rope=Rope(1e4, kind="linear", factor=4.0)),
    "qwen2": replace(BASE, attention_bias=True, rope=Rope(1e6)),
    "qwen3": replace(
        BASE,
        qk_norm=True,
        rope=Rope(1e6, kind="yarn", factor=4.0, original_max_seq_len=128, attention_factor=1.14),
    ),
    "smollm3": replace(BASE, no_rope=(3,)),
    "phi3": replace(BASE, window=100, rope=Rope(1e4, dim=8)),
    "granite": replace(
        BASE, embedding_scale=12.0, residual_scale=0.22, logits_scale=1 / 7, attention_scale=0.01
    ),
    "gemma2": replace(GEMMA, windowed=(0, 2), attention_cap=50.0, logits_cap=30.0),
    "gemma3": replace(
        GEMMA, qk_norm=True, windowed=(0, 1, 2), rope=Rope(1e6, kind="linear", factor=8.0),
        local_rope=Rope(1e4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_config_comes_back(case: str) -> None:
    config = CASES[case]
    keys = json.loads(json.dumps(to_hf(config, case.split(",")[0], "model.gguf")))
    found = from_hf(keys, "config.json")
    assert found.logits_scale == pytest.approx(config.logits_scale)
    assert replace(found, logits_scale=0.0) == replace(config, logits_scale=0.0)


def test_what_the_keys_cannot_say_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.gguf: its metadata describe"):
        to_hf(replace(BASE, attention_scale=0.5), "llama", "model.gguf")
    with pytest.raises(InputError, match="'falcon' cannot be written"):
        to_hf(BASE, "falcon", "model.gguf")


@pytest.mark.parametrize("first", [False, True])
def test_a_tokenizer_comes_back(first: bool, tmp_path: Path) -> None:
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    made = train_bytes(split, None)
    bos = made.token_to_id(SPECIAL[0])
    path = gguf_of(tmp_path / "m.gguf", made, pre="gpt-2", add_bos_token=first, bos_token_id=bos)
    source = open_checkpoint(path)
    for name, content in tokenizer_files(path, source.config).items():
        (tmp_path / name).write_bytes(content)
    ours, theirs = load_codec(Checkpoint(tmp_path, "safetensors", {}, {})), load_codec(source)
    for text in TEXTS:
        for whole in (False, True):
            tokens = theirs.encode(text, whole)
            assert ours.encode(text, whole) == tokens
            assert ours.decode(tokens) == theirs.decode(tokens)
    assert len(ours.encode("a", True)) - len(ours.encode("a", False)) == int(first)
    assert ours.stop_tokens == theirs.stop_tokens
    assert ours.special == theirs.special and ours.chat_templates == theirs.chat_templates
