"""Reads the tokenizer in a model's folder: `tokenizer.json`, or else `tokenizer.model` (SentencePiece,
or tiktoken as in Meta's Llama 3), or else `vocab.json` with `merges.txt`; and the settings for it in
Hugging Face's other files.

`tokenizer.json` is used unchanged. (For some models' classes, Llama's among them, transformers 5 uses
only its vocabulary and rebuilds the rest, which drops the space that a text begins with.)

What is not here: Mistral's tekken.json, which is refused with advice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from base.errors import InputError
from models.tokenizer.byte_level import (
    META_FIRST,
    META_STOP,
    build_tiktoken,
    is_tiktoken,
    meta_special,
    read_tiktoken,
)
from models.tokenizer.codec import Ends, Templates, TextCodec, make_codec, named_templates
from models.tokenizer.limits import check_added, check_json, guarded
from models.tokenizer.spm import USER_DEFINED, SpmVocabulary, build_spm, read_spm
from models.tokenizer.vocab import build_vocab, read_vocab, vocab_class
from weights.files import HEADER_LIMIT, damaged, read_json, regular_file
from weights.texts import without_mark

_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TEMPLATE_LIMIT = 1 << 20  # bytes of a chat template; the longest known are about 20 KiB


def folder_codec(folder: Path, config: Mapping[str, Any]) -> TextCodec:
    """The codec of the files in `folder`; `config` is its config.json. Raises InputError for a missing,
    damaged or unsupported tokenizer."""
    settings = _optional_json(folder / "special_tokens_map.json")
    settings |= _optional_json(folder / "tokenizer_config.json")
    added = _added_tokens(folder, settings)
    special = {name: _content(settings[name], name, folder) for name in _NAMES if settings.get(name)}
    doubled_space = False
    stop: tuple[int, ...] = ()
    ends: Ends | None = None  # tokenizer.json decides, not the settings, as in transformers
    if (file := folder / "tokenizer.json").exists():
        tokenizer = _from_json(file)
    elif (file := folder / "tokenizer.model").exists():
        if is_tiktoken(file):
            ranks = read_tiktoken(file)
            if not added:
                added = meta_special(len(ranks))
                _check_meta(file, len(ranks), len(added), config.get("vocab_size"))
                stop = tuple(len(ranks) + i for i in META_STOP)
                special = {
                    "bos_token": added[len(ranks) + META_FIRST].content,
                    "eos_token": added[len(ranks) + META_STOP[0]].content,
                }
            tokenizer = _built(file, lambda: build_tiktoken(ranks))
            settings = {"add_bos_token": True, **settings}
        else:
            vocabulary = _renamed(read_spm(file), added)
            if settings.get("legacy") is True:
                vocabulary = replace(vocabulary, after_special=True)
            if settings.get("add_prefix_space") is False:
                vocabulary = replace(vocabulary, dummy_prefix=False)
            tokenizer = _built(file, lambda: build_spm(vocabulary))
            doubled_space = vocabulary.doubled_space
            special = _named_pieces(vocabulary) | special
            # Llama's default. (transformers 5 documents it, but adds no token.)
            settings = {"add_bos_token": not vocabulary.unigram, **settings}
    elif (file := folder / "vocab.json").exists():
        known = vocab_class(folder, settings, config)
        vocab, merges = read_vocab(folder)
        prefix_space = settings.get("add_prefix_space") is True
        tokenizer = _built(file, lambda: build_vocab(vocab, merges, known.splitting, prefix_space))
        special |= {name: token for name, token in known.special.items() if name not in settings}
    else:
        raise InputError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model nor vocab.json; copy the "
            "model's file there, or save its tokenizer again with transformers"
        )
    _add(tokenizer, file, added, special, _further(settings, folder))
    if file.name != "tokenizer.json":
        ends = _ends(tokenizer, settings, special, folder)
    declared = _stop_tokens(folder, config)
    if declared is None:
        declared = stop or _ids(tokenizer, special.get("eos_token"))
    templates = _templates(folder, settings)
    return make_codec(tokenizer, ends, frozenset(declared), templates, special, doubled_space)


def _from_json(file: Path) -> Tokenizer:
    size = regular_file(file, "a tokenizer")
    if size > HEADER_LIMIT:
        raise InputError(f"{file} has {size} bytes; no tokenizer is larger than {HEADER_LIMIT}")

    def build() -> Tokenizer:
        text = without_mark(file.read_bytes()).decode()
        check_json(text)
        return Tokenizer.from_str(text)

    return _built(file, build)


def _built(file: Path, build: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer from `build`, tried once. Every exception becomes an InputError."""

    def tried() -> Tokenizer:
        tokenizer = build()
        # tokenizer.json may hold settings of a training run, which would truncate or pad a text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode("a").ids)  # some damage shows only in use
        return tokenizer

    try:
        return guarded(tried, ValueError)
    except Exception as error:
        raise damaged(file, "a tokenizer", error) from error


def _check_meta(file: Path, base: int, special: int, vocab_size: object) -> None:
    """Raise InputError unless the vocabulary has Llama 3's structure: Llama 4 has other special tokens
    and another pre-tokenizer in a file of the same kind."""
    if vocab_size is not None and vocab_size != base + special:
        raise InputError(
            f"{file} holds {base} tokens, with Llama 3's {special} special ones {base + special}, but "
            f"the model has {vocab_size}: it is not of Llama 3; use a folder with a tokenizer.json"
        )


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json, or else added_tokens.json, adds to the vocabulary, by id.
    Raises InputError."""
    found = {}
    entries = settings.get("added_tokens_decoder")
    if entries is None:
        names = _optional_json(folder / "added_tokens.json")
        entries = {i: {"content": name, "normalized": True} for name, i in names.items()}
    try:
        for key, entry in entries.items():
            flags = {
                name: bool(entry.get(name, False))
                for name in ("special", "lstrip", "rstrip", "single_word")
            }
            normalized = bool(entry.get("normalized", not flags["special"]))
            found[int(key)] = AddedToken(entry["content"], normalized=normalized, **flags)
        if any(not 0 <= i < 1 << 31 or not token.content for i, token in found.items()):
            raise ValueError("an id or a token is out of range")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}: the added tokens in tokenizer_config.json or added_tokens.json cannot be used "
            f"({type(error).__name__}: {error}); download the file again"
        ) from error
    return dict(sorted(found.items()))


def _further(settings: Mapping[str, Any], folder: Path) -> list[str]:
    """The special tokens that have no name such as "bos_token"."""
    further: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = settings.get(key) or []
        values = list(values.values()) if isinstance(values, dict) else values
        if not isinstance(values, list):
            raise InputError(f"{folder}/tokenizer_config.json: {key} must be a list of tokens")
        further += [_content(value, key, folder) for value in values]
    return further


def _content(value: Any, name: str, folder: Path) -> str:
    """The text of a token in tokenizer_config.json, which writes a string or an object with one."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise InputError(
            f"{folder}/tokenizer_config.json: {name} must be a token, not {str(value)[:100]}"
        )
    return content


def _add(
    tokenizer: Tokenizer,
    file: Path,
    added: Mapping[int, AddedToken],
    special: Mapping[str, str],
    further: list[str],
) -> None:
    """Add the tokens that the vocabulary lacks, and mark named tokens as special. Raises InputError if
    a token does not get its declared id."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    new = [token for token in added.values() if token.content not in known]
    known |= {token.content: token for token in new}
    for name in (*special.values(), *further):
        token = known.get(name)
        if token is None or not token.special:
            token = token or AddedToken(name, normalized=False)
            token.special = True
            new.append(token)
            known[name] = token
    try:
        check_added(known)
        tokenizer.add_tokens(new)
    except ValueError as error:
        raise damaged(file, "a tokenizer", error) from error
    for i, token in added.items():
        if tokenizer.token_to_id(token.content) != i:
            raise InputError(
                f"{file}: {token.content!r} has id {tokenizer.token_to_id(token.content)}, but id {i} "
                "in tokenizer_config.json or added_tokens.json; the files are of different models"
            )


def _renamed(vocabulary: SpmVocabulary, added: Mapping[int, AddedToken]) -> SpmVocabulary:
    """The vocabulary with its placeholders renamed as tokenizer_config.json says."""
    pieces, types = list(vocabulary.pieces), list(vocabulary.types)
    for i, token in added.items():
        if i < len(pieces) and pieces[i] != token.content:
            pieces[i] = token.content
            types[i] = USER_DEFINED  # no merges produce it; `_add` marks it special if it is
    return replace(vocabulary, pieces=tuple(pieces), types=tuple(types))


def _named_pieces(vocabulary: SpmVocabulary) -> dict[str, str]:
    ids = {"bos": vocabulary.bos, "eos": vocabulary.eos, "unk": vocabulary.unk, "pad": vocabulary.pad}
    return {
        f"{name}_token": vocabulary.pieces[i]
        for name, i in ids.items()
        if 0 <= i < len(vocabulary.pieces)
    }


def _ids(tokenizer: Tokenizer, token: str | None) -> tuple[int, ...]:
    index = None if token is None else tokenizer.token_to_id(token)
    return () if index is None else (index,)


def _ends(
    tokenizer: Tokenizer, settings: Mapping[str, Any], special: Mapping[str, str], folder: Path
) -> Ends:
    for key in ("add_bos_token", "add_eos_token"):
        if not isinstance(settings.get(key, False), bool | None):
            raise InputError(f"{folder}/tokenizer_config.json: {key} must be true or false")
    before = _ids(tokenizer, special.get("bos_token")) if settings.get("add_bos_token") else ()
    after = _ids(tokenizer, special.get("eos_token")) if settings.get("add_eos_token") else ()
    return Ends(before, after)


def _stop_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The declared ids that end an answer, without negative ones, which mean no token; None if nothing
    is declared. Raises InputError for values that are not ids."""
    places = (_optional_json(folder / "generation_config.json"), config)
    for eos in (place.get("eos_token_id") for place in places):
        found = [i for i in (eos if isinstance(eos, list) else [eos]) if i is not None]
        if any(type(i) is not int for i in found):
            raise InputError(
                f"{folder}: eos_token_id in generation_config.json or config.json must be a token's id "
                f"or a list of them, not {str(eos)[:100]}"
            )
        if found:
            return tuple(i for i in found if i >= 0)
    return None


def _templates(folder: Path, settings: Mapping[str, Any]) -> Templates:
    """Chat templates by name: from template files if there are any, else from tokenizer_config.json."""
    found: Templates = {}
    if (file := folder / "chat_template.jinja").exists():
        found["default"] = _read_template(file)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = _read_template(file)
    return found or named_templates(settings.get("chat_template"), f"{folder}/tokenizer_config.json")


def _read_template(file: Path) -> str | InputError:
    try:
        size = regular_file(file, "a chat template")
        if size > _TEMPLATE_LIMIT:
            return InputError(
                f"{file} has {size} bytes; no chat template is larger than {_TEMPLATE_LIMIT}"
            )
        return without_mark(file.read_bytes()).decode()
    except InputError as error:
        return error
    except (OSError, ValueError) as error:
        return damaged(file, "a chat template", error)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
