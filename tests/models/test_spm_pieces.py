"""The quick way through a SentencePiece file's pieces reads what the slow way reads."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

import pytest

from models.tokenizer import spm
from models.tokenizer.spm import read_spm
from tests.models.vocabularies import train_spm


def field(number: int, value: int | bytes | float) -> bytes:
    """A field of a protobuf message: a number, a text or message, or a 32-bit float."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def random_file(seed: int) -> bytes:
    """Pieces as sentencepiece writes them, and, further behind, in all the other ways that the format
    allows; of some seeds also cut short, or with a byte changed."""
    random = Random(seed)
    parts = [field(3, field(3, 1))] if seed % 5 == 0 else []
    for i in range(200):
        text, score, kind = f"p{i}" + "\u2581é" * random.randrange(8), -float(i), random.randrange(1, 7)
        fields = [field(1, text.encode()), field(2, score)] + [field(3, kind)] * (kind > 1)
        if random.random() < (0.01 if i < 100 else 0.5):
            odd = random.randrange(5)
            if odd == 0:
                fields.reverse()
            elif odd == 1:
                fields[0] = field(1, (text + "long" * 40).encode())
            elif odd == 2:
                fields += [field(15, b"extra"), field(3, 300)]
            elif odd == 3:
                del fields[random.randrange(2)]
            else:
                fields.append(field(2, 7.0))
        parts.append(field(1, b"".join(fields)))
    data = b"".join([*parts, field(2, field(3, 2) + field(35, 1))])
    if seed % 3 == 1:
        data = data[: random.randrange(len(data))]
    if seed % 7 == 2:
        at = random.randrange(len(data))
        data = data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
    return data


def slowly(path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(spm, "_first_pieces", lambda content: ([], [], [], 0))
        return outcome(path)


def outcome(path: Path) -> object:
    try:
        return read_spm(path)
    except ValueError as error:
        return type(error)


@pytest.mark.parametrize("seed", range(60))
def test_any_file(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(random_file(seed))
    assert repr(outcome(path)) == repr(slowly(path, monkeypatch))  # repr: a score may be nan


def test_a_trained_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train_spm(tmp_path / "tokenizer.model")
    found = read_spm(path)
    assert found == slowly(path, monkeypatch)
    texts, *_, rest = spm._first_pieces(path.read_bytes())
    assert tuple(texts) == found.pieces and rest > 1000  # the quick way took them all
