"""Texts as tokens: the calibration text of GPTQ, and the text of a perplexity measurement."""

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

WINDOW = 1024  # perplexity is measured in windows of this many tokens
_LIMIT = 1 << 28  # bytes of a text


def read_tokens(path: str, key: str, checkpoint: Checkpoint, config: ModelConfig) -> Tensor:
    """The text of a file as tokens of the model: int64 [T], T >= 2. `key` is the command's key for the
    file, for messages. Raises InputError."""
    size = regular_file(Path(path), "a text")
    if size > _LIMIT:
        raise InputError(f"{key}={path} has {size} bytes; give a text of at most {_LIMIT} bytes")
    try:
        # Unchanged, with carriage returns: the model must be measured on exactly this text.
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
        raise InputError(f"{key}={path} has {len(tokens)} tokens; give a text of at least two")
    return tokens


def spread(tokens: Tensor, samples: int, length: int) -> list[Tensor]:
    """At most `samples` pieces of `length` tokens, evenly spaced over a text and without overlap; all
    of a text that is shorter than that."""
    pieces = [piece for piece in tokens.split(length) if len(piece) > 1]
    if len(pieces) <= samples:
        return pieces
    return [pieces[i * len(pieces) // samples] for i in range(samples)]
