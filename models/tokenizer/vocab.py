"""Byte-level BPE from `vocab.json` and `merges.txt`. These files do not say how a text is split into
words: that follows from the class that tokenizer_config.json names, as in transformers.

What is not here: classes that are not byte-level, and defaults for unknown classes: both are refused by
name.

Sources: transformers' tokenization_gpt2, _gpt_neox, _codegen, _qwen2, and its classes by model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from base.errors import InputError
from models.tokenizer.byte_level import SPLITTINGS, Splitting, build_bytes
from weights.files import DAMAGE, HEADER_LIMIT, damaged, read_json, regular_file
from weights.texts import lines_of

_END = "<|endoftext|>"


@dataclass(frozen=True)
class VocabClass:
    """What a class defines: how words are split, and the special tokens that settings may omit."""

    splitting: Splitting
    special: Mapping[str, str]


_PLAIN = SPLITTINGS["gpt-2"]
_NAMES = ("bos_token", "eos_token", "unk_token")
_GPT_2 = VocabClass(_PLAIN, dict.fromkeys(_NAMES, _END))
_CLASSES = {
    "GPT2Tokenizer": _GPT_2,
    "CodeGenTokenizer": _GPT_2,
    "GPTNeoXTokenizer": VocabClass(
        Splitting(_PLAIN.steps, nfc=True), {**dict.fromkeys(_NAMES, _END), "pad_token": "<|padding|>"}
    ),
    "Qwen2Tokenizer": VocabClass(
        SPLITTINGS["qwen2"], dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END)
    ),
}
# If no class is named: by the model_type in config.json.
_BY_MODEL = {
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo", "phi", "opt", "starcoder2", "dbrx"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
}


def vocab_class(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> VocabClass:
    """The class of the tokenizer in `folder`. Raises InputError for one that is not known."""
    name = settings.get("tokenizer_class") or _BY_MODEL.get(str(config.get("model_type")))
    found = _CLASSES.get(str(name).removesuffix("Fast"))
    if found is None:
        said = f"the class {str(name)[:100]!r}" if name else "no class"
        raise InputError(
            f"{folder} holds vocab.json and merges.txt, tokenizer_config.json names {said}: without "
            f"a tokenizer.json only {', '.join(_CLASSES)} are supported; save the tokenizer again "
            "with transformers"
        )
    return found


def read_vocab(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of vocab.json and the pairs of merges.txt. Raises InputError for damaged files."""
    file = folder / "vocab.json"
    vocab = read_json(file, unique=True)
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in vocab.values()):
        raise damaged(file, "a vocabulary", "it must map tokens to their ids")
    if len(set(vocab.values())) != len(vocab):
        raise damaged(file, "a vocabulary", "two tokens have the same id")
    return vocab, _read_merges(folder / "merges.txt")


def _read_merges(file: Path) -> list[tuple[str, str]]:
    size = regular_file(file, "merges")
    if size > HEADER_LIMIT:
        raise InputError(f"{file} has {size} bytes; no list of merges is larger than {HEADER_LIMIT}")
    merges = []
    try:
        for i, line in enumerate(lines_of(file.read_bytes()), 1):
            if line.startswith(b"#version") or (not line and i > 1):
                continue
            left, space, right = line.decode().partition(" ")
            if not (left and space and right) or " " in right:
                raise ValueError(f"line {i} is not two tokens with a space between them")
            merges.append((left, right))
    except DAMAGE as error:
        raise damaged(file, "merges", error) from error
    return merges


def build_vocab(
    vocab: dict[str, int], merges: list[tuple[str, str]], splitting: Splitting, prefix_space: bool
) -> Tokenizer:
    """The pipeline, without special tokens. Raises the library's own errors for a vocabulary that it
    cannot use."""
    tokenizer = build_bytes(vocab, merges, splitting)
    if prefix_space:
        steps = splitting.steps()
        steps[-1].add_prefix_space = True  # type: ignore[attr-defined]  # in each of the classes, ByteLevel
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer
