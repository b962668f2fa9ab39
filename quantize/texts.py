"""Texts as tokens: what GPTQ looks at, and what perplexity is measured on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from base.errors import InputError
from models.config import ModelConfig
from models.tokenizer.codec import within_vocabulary
from models.tokenizer.open import load_codec
from weights.checkpoint import Checkpoint
from weights.files import regular_file
from weights.texts import without_mark

WINDOW = 1024  # tokens that perplexity is measured over at once
_LIMIT = 1 << 28  # bytes of a text


def read_tokens(path: str, key: str, checkpoint: Checkpoint, config: ModelConfig) -> Tensor:
    """A file's text as the model's tokens: int64 [T], two at least. `key` is the word that named the
    file. Raises InputError."""
    size = regular_file(Path(path), "a text")
    if size > _LIMIT:
        raise InputError(f"{key}={path} has {size} bytes; give a part of it, of at most {_LIMIT}")
    try:
        # As it is, carriage returns too: what the model is judged on is what the file holds.
        text = without_mark(Path(path).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{key}={path} is not UTF-8 (byte {error.start}); give a plain text"
        ) from error
    try:
        found = within_vocabulary(load_codec(checkpoint), config.vocab_size).encode(text, True)
    except InputError as error:
        raise InputError(f"{key}={path}: {error}") from error
    tokens = torch.tensor(found, dtype=torch.int64)
    if len(tokens) < 2:
        raise InputError(f"{key}={path} has {len(tokens)} tokens; two are the least")
    return tokens


def spread(tokens: Tensor, samples: int, length: int) -> list[Tensor]:
    """At most `samples` pieces of `length` tokens, evenly over a text and without overlap; where it is
    shorter than that, all of it."""
    pieces = [piece for piece in tokens.split(length) if len(piece) > 1]
    if len(pieces) <= samples:
        return pieces
    return [pieces[i * len(pieces) // samples] for i in range(samples)]
