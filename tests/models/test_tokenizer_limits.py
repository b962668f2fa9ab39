"""Tokenizers and texts that would take time or memory beyond all proportion are refused at once."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from base.errors import InputError
from models.tokenizer.codec import make_codec
from models.tokenizer.divisions import divisions
from models.tokenizer.limits import check_json, check_length, guarded
from tests.models.hostile_texts import (
    HARMLESS,
    PIPELINES,
    VOCABULARIES,
    escaped,
    plain_json,
    write_json,
)
from tests.models.tokenizer_folders import read
from tests.models.vocabularies import CORPUS


@contextmanager
def bounded(seconds: float = 2.0, extra_bytes: int = 200 << 20) -> Iterator[None]:
    """A block that takes so much processor time and memory at most, beyond what was used before."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    started, before = usage.ru_utime + usage.ru_stime, _peak()
    yield
    usage = resource.getrusage(resource.RUSAGE_SELF)
    assert usage.ru_utime + usage.ru_stime - started < seconds
    assert _peak() - before < extra_bytes


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_without_proportion_is_refused(name: str, tmp_path: Path) -> None:
    for text in (str, escaped):
        file = write_json(tmp_path, PIPELINES[name](), text)
        with bounded(extra_bytes=10 * file.stat().st_size + (200 << 20)):
            if name in HARMLESS:
                codec = read(tmp_path)
                assert codec.encode("ab", True) == [0, 1]
                continue
            with pytest.raises(InputError, match=r"tokenizer\.json cannot be read as a tokenizer"):
                read(tmp_path)


REFUSED = ("a long piece", "long pieces", "every length", "a long normalization")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_is_read_in_proportion_or_refused(name: str, tmp_path: Path) -> None:
    file = VOCABULARIES[name](tmp_path)
    with bounded(extra_bytes=10 * file.stat().st_size + (200 << 20)):
        if name in REFUSED:
            with pytest.raises(InputError, match=r"tokenizer\.model cannot be read as"):
                read(tmp_path)
        else:
            assert read(tmp_path).encode("a", False)


def test_pieces_are_divided_in_every_way() -> None:
    """Against trying every place."""
    words = sorted({word[:i] for text in CORPUS for word in text.split() for i in range(1, 9)})
    expected = every_division(words)
    assert divisions(words) == expected and expected
    in_bytes = [word.encode() for word in words]
    assert divisions(in_bytes) == every_division(in_bytes)
    assert divisions([""]) == divisions([]) == []
    with pytest.raises(ValueError, match="in too many ways"):
        divisions(["a" * i for i in range(1, 1000)])
    with pytest.raises(ValueError, match="a piece of 5000 characters; 4096 is the most"):
        divisions(["a", "a" * 5000])


def test_many_pieces_are_divided_as_few_are() -> None:
    """More than are hashed at once, of every kind of character, the longest ones too."""
    random = Random(0)
    letters = ["a", "b", "\0", "\u2581", "\u00e9", "\U0001f600", "\ud800", ""]
    pieces = ["".join(random.choices(letters, k=random.randrange(9))) for _ in range(30_000)]
    pieces += ["ab" * i for i in range(4, 2049, 200)] + ["ab" * 2048]
    pieces = list(dict.fromkeys(pieces))
    random.shuffle(pieces)
    found = divisions(pieces)
    assert found == every_division(pieces) and len(found) > 20_000


def every_division(pieces: list[Any]) -> list[tuple[Any, Any]]:
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def test_steps_that_tokenizers_in_use_have_pass() -> None:
    parts = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "NFKD"},
        {"type": "Lowercase"},
    ]
    check_json(
        json.dumps(plain_json() | {"normalizer": {"type": "Sequence", "normalizers": parts[:2]}})
    )
    check_json(
        json.dumps(plain_json() | {"normalizer": {"type": "Sequence", "normalizers": parts[2:]}})
    )


def test_a_text_that_cannot_fit_is_refused_by_its_length() -> None:
    def longest() -> int:
        return 10

    check_length(1 << 20, longest, 10)  # short enough to be counted
    check_length(40 * 100_000, longest, 100_000)
    with pytest.raises(InputError, match=r"11000001 characters cannot fit in max_seq_len=1000 tokens"):
        check_length(11_000_001, longest, 1000)
    tokenizer = Tokenizer(models.BPE({"a": 0, "abc": 1}, []))
    tokenizer.add_tokens(["<end>"])
    assert make_codec(tokenizer).longest() == 5


def test_a_panic_of_the_library_is_an_input_error() -> None:
    """A regular expression that looks back through more spaces than its library allows."""
    tokenizer = Tokenizer(models.BPE({"a": 0, " ": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+"), "isolated")
    codec = make_codec(tokenizer)
    with pytest.raises(InputError, match="cannot take a text of 11000001 characters"):
        codec.encode(" " * 11_000_000 + "a", True)  # at its library's limit of steps
    assert codec.encode(" a", True) == [1, 0]

    class PanicException(BaseException):
        pass

    def panics() -> None:
        raise PanicException("x" * 1000)

    with pytest.raises(ValueError, match=r"^x{200}$"):
        guarded(panics, ValueError)
    with pytest.raises(KeyboardInterrupt):
        guarded(_interrupted, ValueError)


def _interrupted() -> None:
    raise KeyboardInterrupt
