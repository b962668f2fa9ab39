"""Limits on the time and memory of an untrusted tokenizer, checked before the library builds or uses
it.

The library has no limits. Forty steps that each write two letters for one make a terabyte of the first
word; an added token takes eighty times its length in memory. So each step of a pipeline has a factor by
which it can lengthen a text, and the product of the factors is limited. Added tokens are limited.
All limits are far above those of real tokenizers.
`guarded` converts a panic of the library, which is not an Exception, into an error that callers handle.

What is not here: checks of invalid values, which the library itself refuses; the ways to split pieces
into other pieces (`models.tokenizer.divisions` limits them).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from base.errors import InputError

_GROWTH = 64.0  # factor by which a pipeline may lengthen a text, beyond Unicode normalization
_AROUND = 4096  # tokens added around a text
_ADDED = 4096  # characters of an added token
_ADDED_ALL = 1 << 21  # characters of all added tokens
_WORD = 1000  # characters of a word that is matched in quadratic time
# If a file writes its keys without escapes, these values can be read without parsing its vocabulary.
_PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens")
_SCALARS = ("continuing_subword_prefix", "end_of_word_suffix", "max_input_chars_per_word")
_KEY = re.compile(f'"({"|".join((*_PARTS, *_SCALARS))})"\\s*:\\s*')
_HIDDEN = re.compile(r"\\u00(?:[2-6]|7[0-9a-eA-E])")  # a letter written as an escape
_CHILDREN = ("normalizers", "pretokenizers", "decoders", "processors")
# The most by which Unicode normalization lengthens an earlier step's output (a ligature: 18 letters).
_FORMS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Precompiled": 18, "Lowercase": 3, "Nmt": 1}
_FORMS |= {"BertNormalizer": 18}
_BYTES = {"ByteLevel": 3.0, "Metaspace": 2.0, "WordPiece": 2.0, "CTC": 2.0, "BPEDecoder": 2.0}

_R = TypeVar("_R")


def guarded(call: Callable[[], _R], panic: Callable[[str], Exception]) -> _R:
    """The result of `call`. A panic of the library is raised as the exception that `panic` makes; other
    exceptions pass."""
    try:
        return call()
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise panic(str(error)[:200]) from error


def check_json(text: str) -> None:
    """Raise ValueError for a tokenizer.json that could take excessive time or memory."""
    try:
        values = _values(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    for key, value in values:
        if key == "added_tokens":
            entries = value if isinstance(value, list) else []
            check_added(entry.get("content") for entry in entries if isinstance(entry, dict))
        elif key == "post_processor":
            _check_around(value)
        elif key == "max_input_chars_per_word":
            if isinstance(value, int) and value > _WORD:
                raise ValueError(f"words of up to {value} characters; {_WORD} is the most")
        elif key in _SCALARS:
            if isinstance(value, str) and len(value) > _GROWTH:
                raise ValueError(f"{key} has {len(value)} characters; {_GROWTH:.0f} is the most")
        elif (growth := _growth(value)) > _GROWTH:
            raise ValueError(
                f"its {key} could make a text {growth:.3g} times as long; {_GROWTH:.0f} is the most"
            )


def _values(text: str) -> list[tuple[str, Any]]:
    """The values of the checked keys, anywhere in the file: a file may have a key twice."""
    if _HIDDEN.search(text):
        return list(_walk(json.loads(text)))
    decoder, found, end = json.JSONDecoder(), [], 0
    for match in _KEY.finditer(text):
        if match.end() >= end:
            value, end = decoder.raw_decode(text, match.end())
            found.append((match[1], value))
    return found


def _walk(value: Any) -> Iterable[tuple[str, Any]]:
    level = [value]
    while level:
        objects = [item for item in level if isinstance(item, dict)]
        for item in objects:
            yield from ((key, item[key]) for key in (*_PARTS, *_SCALARS) if key in item)
        level = [x for item in level if isinstance(item, list) for x in item]
        level += [x for item in objects for x in item.values()]


def _growth(step: Any) -> float:
    """The factor by which a step, or a sequence of steps, can lengthen a text."""
    growth, fed = 1.0, False
    for part in _steps(step):
        kind = str(part.get("type"))  # may be missing: then the fields identify the step
        written = part.get("content") or part.get("prepend") or part.get("replacement") or ""
        length = len(written) if isinstance(written, str) else 1
        if "pattern" in part and "content" in part:
            pattern = part["pattern"]
            plain = pattern.get("String") if isinstance(pattern, dict) else None
            # A regular expression may match between any two characters.
            growth *= max(1.0, length / len(plain)) if isinstance(plain, str) and plain else length + 1
        elif "prepend" in part:
            growth *= length + 1
        elif "precompiled_charsmap" in part:
            growth *= charsmap_growth(base64.b64decode(str(part["precompiled_charsmap"] or "")))
        else:
            growth *= _BYTES.get(kind, 1.0)
        growth *= _FORMS.get(kind, 1) if fed else 1
        fed = fed or (length > 0 and not str(written).isascii())
    return growth


def charsmap_growth(charsmap: bytes) -> float:
    """The growth factor of SentencePiece's compiled normalization: the size of a trie, the trie, and
    the replacement texts, separated by zero bytes. 1 if it is within Unicode normalization."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    longest = max(map(len, texts.split(b"\0")))
    return longest / 48 if longest > 48 else 1.0


def _steps(step: Any) -> Iterable[Mapping[str, Any]]:
    """The steps of a pipeline in order, with sequences flattened."""
    stack = [step]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            yield part
            inner = [x for key in _CHILDREN if isinstance(part.get(key), list) for x in part[key]]
            stack += reversed(inner)


def _check_around(processor: Any) -> None:
    """Raise ValueError if a post-processor repeats a text or adds too many tokens around it. Templates
    apply one after another."""
    copies, around = 1, 0
    for part in _steps(processor):
        special = part.get("special_tokens")
        special = special if isinstance(special, dict) else {}
        texts, added = 0, 0
        template = part.get("single")
        for piece in template if isinstance(template, list) else ():
            if "Sequence" in piece:
                texts += 1
            else:
                token = special.get((piece.get("SpecialToken") or {}).get("id")) or {}
                added += len(token.get("ids") or ())
        if "single" in part:
            copies, around = copies * texts, around * texts + added
        if copies > 1 or around > _AROUND:
            raise ValueError(
                f"its post_processor gives a text {copies} times, with {around} tokens around it; "
                f"1 and {_AROUND} are the most"
            )


def check_added(contents: Iterable[Any]) -> None:
    """Raise ValueError if added tokens with these texts are too long, each or in total."""
    lengths = [len(content) for content in contents if isinstance(content, str)]
    if max(lengths, default=0) > _ADDED:
        raise ValueError(f"an added token of {max(lengths)} characters; {_ADDED} is the most")
    if sum(lengths) > _ADDED_ALL:
        raise ValueError(f"added tokens of {sum(lengths)} characters; {_ADDED_ALL} is the most")


def check_length(length: int, longest: Callable[[], int], room: int) -> None:
    """Raise InputError for a text of `length` characters that cannot fit in `room` tokens of at most
    `longest()` characters each: tokenizing it would only waste time and memory."""
    if length <= 1 << 20:
        return
    # NFC may compose three or more characters into one.
    most = max(1 << 20, 4 * room * longest())
    if length > most:
        raise InputError(
            f"a text of {length} characters cannot fit in max_seq_len={room} tokens, which hold {most} "
            "at most; shorten it, or raise max_seq_len"
        )
