"""Folders of tokenizers, read and compared."""

from __future__ import annotations

import base64
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from models.tokenizer.byte_level import spell
from models.tokenizer.codec import TextCodec
from models.tokenizer.open import load_codec
from tests.models.pre_tokenizers import LLAMA_3, patterns
from tests.models.vocabularies import TEXTS, train_bytes, train_spm
from weights.checkpoint import Checkpoint


def read(folder: Path, **config: Any) -> TextCodec:
    return load_codec(Checkpoint(folder, "safetensors", {}, config))


def write(folder: Path, name: str = "tokenizer_config.json", **content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def assert_equal(codec: TextCodec, reference: Any, texts: list[str] = TEXTS) -> None:
    for text in texts:
        for whole in (True, False):
            tokens = codec.encode(text, whole)
            assert tokens == reference.encode(text, add_special_tokens=whole), text
            assert codec.decode(tokens) == reference.decode(tokens, skip_special_tokens=True), text


@functools.cache
def spm_model() -> bytes:
    """A SentencePiece model, as Llama 2 has one."""
    with tempfile.TemporaryDirectory() as folder:
        train_spm(Path(folder) / "tokenizer.model")
        return (Path(folder) / "tokenizer.model").read_bytes()


@functools.cache
def tiktoken_ranks() -> dict[bytes, int]:
    """A vocabulary as tiktoken has it: bytes first, then what BPE has learned, in its order."""
    trained = train_bytes(patterns(LLAMA_3), None)
    letters = {spell(bytes([byte])): byte for byte in range(256)}
    merges = json.loads(trained.to_str())["model"]["merges"]
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        token = bytes(letters[letter] for letter in left + right)
        if token not in tokens:
            tokens.append(token)
    return {token: rank for rank, token in enumerate(tokens)}


def write_tiktoken(folder: Path) -> None:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in tiktoken_ranks().items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
