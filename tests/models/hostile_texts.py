"""Tokenizers and chat templates that ask for more time or memory than they are worth: small files,
built on the spot. A builder that takes a folder writes a file there and returns it."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

Pipeline = dict[str, Any]


def plain_json() -> Pipeline:
    """A tokenizer.json of two tokens, without any step."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    parts: Pipeline = json.loads(tokenizer.to_str())
    return parts


def write_json(folder: Path, parts: Pipeline, text: Callable[[str], str] = str) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(text(json.dumps(parts)))
    return file


def replace(old: str, new: str) -> Pipeline:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _step(key: str, steps: list[Pipeline], kind: str = "Sequence") -> Pipeline:
    names = {
        "normalizer": "normalizers",
        "pre_tokenizer": "pretokenizers",
        "decoder": "decoders",
        "post_processor": "processors",
    }
    return plain_json() | {key: {"type": kind, names[key]: steps}}


def _nested(steps: list[Pipeline]) -> Pipeline:
    """The steps, each in a sequence inside the one of the step before."""
    inner: Pipeline = {"type": "Sequence", "normalizers": []}
    for step in reversed(steps):
        inner = {"type": "Sequence", "normalizers": [step, inner]}
    return plain_json() | {"normalizer": inner}


def _added(*contents: str) -> Pipeline:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [
        {"id": 2 + i, "content": content, "special": True, **flags}
        for i, content in enumerate(contents)
    ]
    return plain_json() | {"added_tokens": tokens}


def _template(copies: int, ids: int, pieces: int) -> Pipeline:
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * copies
    single += [{"SpecialToken": {"id": "a", "type_id": 0}}] * pieces
    special = {"a": {"id": "a", "ids": [0] * ids, "tokens": ["a"] * ids}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


_METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
_EVERY = {
    "type": "Split",
    "pattern": {"Regex": "."},
    "behavior": "Isolated",
    "invert": False,
}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_CHARSMAP = base64.b64encode(struct.pack("<I", 0) + b"x" * 200_000 + b"\0").decode()

PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "doubling": lambda: _step("normalizer", [replace("a", "aa")] * 40),
    "doubling without types": lambda: (
        plain_json()
        | {
            "normalizer": {
                "normalizers": [{"pattern": {"String": "a"}, "content": "aa"}] * 40,
            }
        }
    ),
    "doubling in sequences": lambda: _nested([replace("a", "aa")] * 40),
    "between any two": lambda: _step(
        "normalizer", [{"type": "Replace", "pattern": {"Regex": ""}, "content": "b"}] * 40
    ),
    "prepended": lambda: _step("normalizer", [{"type": "Prepend", "prepend": "x" * 1000}] * 3),
    "a long content": lambda: plain_json() | {"normalizer": replace("a", "a" * 1_000_000)},
    "unfolding": lambda: _step("normalizer", [replace(" ", "\ufdfa"), {"type": "NFKC"}] * 10),
    "normalization": lambda: (
        plain_json() | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": _CHARSMAP}}
    ),
    "bytes of bytes": lambda: _step("pre_tokenizer", [_BYTES] * 40),
    "a space for each": lambda: _step("pre_tokenizer", [_EVERY, _METASPACE] * 40),
    "decoder": lambda: _step("decoder", [replace("a", "aa")] * 40),
    "copies": lambda: _step("post_processor", [_template(2, 1, 0)] * 40),
    "around": lambda: plain_json() | {"post_processor": _template(1, 5000, 5000)},
    "a long added token": lambda: _added("x" * 2_000_000),
    "long added tokens": lambda: _added(*(f"{i:4000}" for i in range(1000))),
    "filled up": lambda: (
        plain_json()
        | {
            "padding": {
                "strategy": {"Fixed": 1_000_000_000},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "a",
            }
        }
    ),
    "long words": lambda: (
        plain_json()
        | {
            "model": {
                "type": "WordPiece",
                "unk_token": "b",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 1_000_000_000,
                "vocab": {"a": 0, "b": 1, "##a": 2},
            }
        }
    ),
    "a long suffix": lambda: (
        plain_json()
        | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "x" * 10**6}}
    ),
}
HARMLESS = ("filled up",)  # because its settings are not used


def escaped(text: str) -> str:
    """The same JSON with names that do not stand there as they are."""
    return text.replace('"normalizer"', '"n\\u006frmalizer"').replace('"Replace"', '"\\u0052eplace"')


def write_spm(
    folder: Path, pieces: Iterable[str], unigram: bool = False, charsmap: bytes = b""
) -> Path:
    """A SentencePiece model of these pieces behind <unk>."""

    def field(number: int, kind: int, value: bytes) -> bytes:
        size = _varint(len(value)) if kind == 2 else b""
        return _varint(number << 3 | kind) + size + value

    def piece(text: str, kind: int) -> bytes:
        content = field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", -1.0))
        return field(1, 2, content + field(3, 0, _varint(kind)))

    data = piece("<unk>", 2) + b"".join(piece(text, 1) for text in pieces)
    data += field(2, 2, field(3, 0, _varint(1 if unigram else 2)))
    data += field(3, 2, field(2, 2, charsmap))
    file = folder / "tokenizer.model"
    file.write_bytes(data)
    return file


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


# Refused, or else opened at once.
VOCABULARIES: dict[str, Callable[[Path], Path]] = {
    "a long piece": lambda folder: write_spm(folder, ["a", "b", "ab" * 50_000]),
    "long pieces": lambda folder: write_spm(folder, ["a" * (1 << i) for i in range(20)]),
    "every length": lambda folder: write_spm(folder, ["a" * i for i in range(1, 1000)]),
    "a long normalization": lambda folder: write_spm(
        folder, ["a"], True, struct.pack("<I", 0) + b"x" * 200_000 + b"\0"
    ),
}

_GROW = "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
TEMPLATES: dict[str, str] = {
    "a power of powers": "{{ 9 ** (9 ** 9) }}",
    "a power in a loop": "{% set ns = namespace(x=9) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "repetition": "{{ 'a' * 10 ** 9 }}",
    "repeated lists": "{{ [1] * 10 ** 9 }}",
    "nonsense texts": "{{ lipsum(n=10 ** 8) }}",
    "doubling": _GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "adding": _GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "joining": _GROW + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}{{ ns.x }}",
    "replacing": _GROW + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}{{ ns.x }}",
    "set blocks": _GROW + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}{{ ns.x }}",
    "growing lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "macros": "{% macro m0() %}aaaaaaaaaa{% endmacro %}"
    + "".join(f"{{% macro m{i}() %}}{{{{ m{i - 1}() * 9 }}}}{{% endmacro %}}" for i in range(1, 20))
    + "{{ m19() }}",
    "calls": "{% macro m0() %}{% endmacro %}"
    + "".join(
        f"{{% macro m{i}() %}}{{{{ m{i - 1}() }}}}{{{{ m{i - 1}() }}}}{{% endmacro %}}"
        for i in range(1, 50)
    )
    + "{{ m49() }}",
    "centered": "{{ 'x'.center(10 ** 10) }}",
    "centered by a filter": "{{ 'x' | center(10 ** 10) }}",
    "formatted": "{{ '%1000000000d' % 1 }}",
    "formatted by a method": "{{ '{:>1000000000}'.format(1) }}",
    "formatted by a filter": "{{ '%1000000000d' | format(1) }}",
    "indented": "{{ messages | tojson(indent=10 ** 9) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "filled": "{{ 'x'.zfill(10 ** 10) }}",
    "batches": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long output": "{% for a in range(9999) %}{% for b in range(9999) %}xxxx{% endfor %}{% endfor %}",
    "parentheses": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "nested lists": "{{ " + "[" * 9000 + "]" * 9000 + " }}",
    "additions": "{{ " + "1" + "+1" * 20_000 + " }}",
    "blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
