"""Small tokenizers made on the spot, in the files and with the settings that real models have, and
the texts that they are compared on."""

# ruff: noqa: RUF001
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<｜User｜>"]
USER = ["<think>", "  \n"]

TEXTS = [
    "The capital of France is",
    "  two  spaces\tand\ttabs\n\n\nlines \r\n ",
    "don't we'll I'VE he'D 12345 3.14159 x1y2 1234567 ٣٤٥ ²³¼ Ⅷ",
    "def f(x):\n\t    return {'a': [x ** 2]}  # ok\n\n\n    pass",
    "naïve café größer Привет, こんにちは世界 你好，世界。 שלום עולם مرحبا",
    "e\u0301a\u0308 हिन्दी ไทย \u1100\u1161 A\u030a \ufb01",
    "👩‍👩‍👧 🇫🇷 👍🏽 \u200d\ufe0f 🏳️‍🌈",
    "\x00\x01\x07\x1b[0m\x7f\x85\u2028\ufeff\u00a0\u3000|",
    "camelCaseWords ALLCAPS iPhone's USA/UK a_b__c $+<=>^~|` !!! ...\n/\n",
    "<s>hi</s><unk> <|im_start|>user\nhi<|im_end|>\n<think> x </think>  \n<｜User｜>y",
    "a <s> b</s> c<think>d",
    "\u2581lower \u2581\u2581 block",
    "<0x41><0x0A>",
    "",
]

CORPUS = [
    "The capital of France is Paris, and the capital of Italy is Rome. Don't you know? We'll see.",
    "def f(x):\n    return {'a': [x ** 2]}  # ok\n\nclass Thing:\n\tdef go(self):\n\t\treturn 12345",
    "naïve café größer Привет, мир こんにちは世界 你好，世界。 שלום מرحبا hello world hello there",
    "the spaces   and    tabs\t\tand lines\n\n\nI'VE 3.14159 x1y2 1234567 camelCaseWords ALLCAPS USA",
    "🙂 👍 🇫🇷 the thing that they think is there, user assistant system message content return",
] * 4


def train_bytes(pre_tokenizer: Mapping[str, Any], normalizer: str | None) -> Tokenizer:
    """Byte-level BPE of some 700 tokens behind the pre-tokenizer of some model's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    parts = json.loads(tokenizer.to_str())
    parts["pre_tokenizer"] = pre_tokenizer
    parts["normalizer"] = None if normalizer is None else {"type": normalizer}
    parts["decoder"] = {"type": "ByteLevel"} | dict.fromkeys(
        ("add_prefix_space", "trim_offsets", "use_regex"), True
    )
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    add_tokens(tokenizer)
    return tokenizer


def add_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in USER])


def write_gguf(path: Path, model: str, tokens: list[str], **keys: Any) -> Path:
    """A GGUF file of one tensor with this tokenizer; `keys` without their "tokenizer.ggml."."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for name, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_array(f"tokenizer.ggml.{name}", value)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{name}", 8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_of(path: Path, tokenizer: Tokenizer, **keys: Any) -> Path:
    """A byte-level BPE as a GGUF file, as llama.cpp's converter writes it."""
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [3 if token in SPECIAL else 4 if token in USER else 1 for token in tokens]
    return write_gguf(path, "gpt2", tokens, merges=merges, token_type=kinds, **keys)


def train_spm(path: Path, **options: Any) -> Path:
    """A SentencePiece model, written to `path`."""
    import io

    import sentencepiece

    written = io.BytesIO()
    settings = {
        "vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "split_digits": True, "allow_whitespace_only_pieces": True, "minloglevel": 2,
        "hard_vocab_limit": False, "user_defined_symbols": ["<think>"],
        "control_symbols": ["<|im_start|>", "<|im_end|>"],
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n") if line),
        model_writer=written,
        **{**settings, **options},
    )
    path.write_bytes(written.getvalue())
    return path
