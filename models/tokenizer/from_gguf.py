"""Reads the tokenizer in a GGUF file's metadata: byte-level BPE ("gpt2") or SentencePiece's BPE
("llama").

What is not here: WordPiece, Unigram and other kinds; pre-tokenizers that
models/tokenizer/byte_level.py does not list. They are refused by name.

Sources: the GGUF specification's section on `tokenizer.ggml.*`; llama.cpp for the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer

from base.errors import InputError
from models.tokenizer.byte_level import SPLITTINGS, Splitting, build_bytes
from models.tokenizer.codec import Ends, Templates, TextCodec, make_codec, named_templates
from models.tokenizer.limits import check_added
from models.tokenizer.spm import CONTROL, NORMAL, USER_DEFINED, SpmVocabulary, build_spm

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
_STOP = ("eos", "eot", "eom")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Pipeline:
    """The arguments of `models.tokenizer.codec.make_codec`."""

    tokenizer: Tokenizer
    ends: Ends
    stop_tokens: frozenset[int]
    chat_templates: Templates
    special: Mapping[str, str]
    doubled_space: bool


def gguf_codec(path: Path, config: Mapping[str, Any]) -> TextCodec:
    """The codec from the metadata `config` of the file at `path`. Raises InputError for a tokenizer
    that is damaged or not supported."""
    found = gguf_pipeline(path, config)
    return make_codec(
        found.tokenizer,
        found.ends,
        found.stop_tokens,
        found.chat_templates,
        found.special,
        found.doubled_space,
    )


def gguf_pipeline(path: Path, config: Mapping[str, Any]) -> Pipeline:
    """The tokenizer pipeline from the metadata `config` of the file at `path`. Raises InputError as
    `gguf_codec` does."""
    kind = config.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"{path} holds a tokenizer of kind {str(kind)[:100]!r}; supported are 'gpt2' (byte-level "
            "BPE) and 'llama' (SentencePiece's BPE)"
        )
    spm = kind == "llama"
    pre = config.get("tokenizer.ggml.pre") or "default"
    if not spm and (not isinstance(pre, str) or pre not in SPLITTINGS):
        raise InputError(
            f"{path} needs the pre-tokenizer {str(pre)[:100]!r}, which is not known; known are "
            + ", ".join(sorted(SPLITTINGS))
        )
    splitting = None if spm else SPLITTINGS[pre]
    try:
        tokens = _texts(config, "tokens")
        types = _numbers(config, "token_type", int, [NORMAL] * len(tokens))
        if len(types) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens have {len(types)} types")
        # llama.cpp's defaults: SentencePiece has these ids; other kinds have no defaults.
        defaults = {"bos": 1, "eos": 2, "unk": 0} if spm else {}
        ids = {
            name: _id(config, _SPECIAL.get(name, name), len(tokens), defaults.get(name))
            for name in (*_SPECIAL, *_STOP)
        }
        doubled_space = False
        if splitting is None:
            vocabulary = _spm_vocabulary(config, tokens, types, ids["unk"])
            tokenizer = build_spm(vocabulary)
            doubled_space = vocabulary.doubled_space
        else:
            tokenizer = _byte_level(config, tokens, types, splitting)
        first = spm if splitting is None else splitting.first_token
        before = ids["bos"] if _flag(config, "add_bos_token", first) else None
        after = ids["eos"] if _flag(config, "add_eos_token", False) else None
        templates = _templates(config, path)
    except InputError:
        raise
    # The library raises bare Exceptions for a vocabulary that it cannot use.
    except Exception as error:
        raise InputError(
            f"{path}: the embedded tokenizer is damaged ({error}); download the model again"
        ) from error
    return Pipeline(
        tokenizer,
        Ends(() if before is None else (before,), () if after is None else (after,)),
        frozenset(i for name in _STOP if (i := ids[name]) is not None),
        templates,
        {f"{name}_token": tokens[i] for name in _SPECIAL if (i := ids[name]) is not None},
        doubled_space,
    )


def _byte_level(
    config: Mapping[str, Any], tokens: list[str], types: list[int], splitting: Splitting
) -> Tokenizer:
    # `add_space_prefix` is ignored here: llama.cpp reads it only for SentencePiece.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("a token occurs twice")
    merges = []
    for merge in _texts(config, "merges"):
        left, right = merge.split(" ", 1)
        merges.append((left, right))
    tokenizer = build_bytes(vocab, merges, splitting)
    # Added tokens are used unchanged, as in the models' own tokenizer.json. (transformers spells those
    # beyond ASCII in GPT-2's alphabet, and then never finds them in a text.)
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    check_added(token.content for token in added)
    tokenizer.add_tokens(added)
    return tokenizer


def _spm_vocabulary(
    config: Mapping[str, Any], tokens: list[str], types: list[int], unk: int | None
) -> SpmVocabulary:
    scores = _numbers(config, "scores", float, None)
    if len(scores) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens have {len(scores)} scores")
    return SpmVocabulary(
        tuple(token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)),
        tuple(scores),
        tuple(types),
        byte_fallback="<0x00>" in tokens,
        # After a special token inside a text no space is added, as in transformers; llama.cpp adds one.
        # The templates of models that need the space write it.
        dummy_prefix=_flag(config, "add_space_prefix", True),
        collapse=_flag(config, "remove_extra_whitespaces", False),
        unk=-1 if unk is None else unk,
    )


def _templates(config: Mapping[str, Any], path: Path) -> Templates:
    """The chat templates by name."""
    key = "tokenizer.chat_template"
    names = config.get("tokenizer.chat_templates") or []
    found = {"default": config.get(key)}
    if isinstance(names, list):
        found |= {str(name): config.get(f"{key}.{name}") for name in names}
    given = {name: template for name, template in found.items() if template is not None}
    return named_templates(given or None, str(path))


def _value(config: Mapping[str, Any], name: str, kind: type[_T], default: _T | None) -> _T | None:
    value = config.get(f"tokenizer.ggml.{name}", default)
    if value is not None and type(value) is not kind:
        raise ValueError(f"{name} is {str(value)[:100]!r}")
    return value


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    return bool(_value(config, name, bool, default))


def _id(config: Mapping[str, Any], name: str, count: int, default: int | None) -> int | None:
    """A token's id; None if it is beyond the vocabulary: converters write -1 as 4294967295."""
    value = _value(config, f"{name}_token_id", int, default)
    return value if value is not None and 0 <= value < count else None


def _texts(config: Mapping[str, Any], name: str) -> list[str]:
    values = _value(config, name, list, None)
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} is missing, empty, or not a list of strings")
    return values


def _numbers(
    config: Mapping[str, Any], name: str, kind: type[_T], default: list[_T] | None
) -> list[_T]:
    values = _value(config, name, list, default)
    if values is None or not all(type(value) is kind for value in values):
        raise ValueError(f"{name} is missing or not a list of numbers")
    return values
