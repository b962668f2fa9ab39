"""GGUF files that lie: every count, length and offset is compared with the file before it is used."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from base.errors import InputError
from tests.weights.lies import refused, save
from tests.weights.samples import tiny, write_gguf
from weights.open import open_checkpoint

pytestmark = pytest.mark.usefixtures("little_memory")
HUGE = (1 << 60, (1 << 64) - 1, 1 << 63, 100 << 30)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")


def raw_gguf(
    tensors: list[bytes] = [],  # noqa: B006 (never changed)
    pairs: list[bytes] = [],  # noqa: B006
    num_tensors: int | None = None,
    num_pairs: int | None = None,
    data: bytes = b"\0" * 64,
    version: int = 3,
) -> bytes:
    pairs = [ARCHITECTURE, *pairs]
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def raw_tensor(
    dims: tuple[int, ...] = (4,),
    kind: int = 0,
    offset: int = 0,
    name: bytes = b"output_norm.weight",
    num_dims: int | None = None,
) -> bytes:
    number = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}Q", number, *dims) + struct.pack("<IQ", kind, offset)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def test_the_gguf_of_these_tests_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", raw_gguf([raw_tensor()]))
    entry = open_checkpoint(path).entries["model.norm.weight"]
    assert entry.read((slice(0, 4),)).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        *((raw_gguf([raw_tensor()], num_tensors=n), "tensors, for which") for n in HUGE),
        *((raw_gguf([raw_tensor()], num_pairs=n), "key-values, for which") for n in HUGE),
        *((raw_gguf([raw_tensor((n,))]), "has shape|ends at byte") for n in HUGE),
        *((raw_gguf([raw_tensor(offset=n)]), "ends at byte") for n in HUGE),
        *((raw_gguf(pairs=[pair(b"k", 8, struct.pack("<Q", n))]), "bytes of 'k'") for n in HUGE),
        *((raw_gguf(pairs=[struct.pack("<Q", n)]), "bytes of a key") for n in HUGE),
        *((raw_gguf(pairs=[pair(b"k", 9, struct.pack("<IQ", t, n))]), "of 'k', for which")
          for n in HUGE for t in (0, 6, 8, 12)),
        (raw_gguf(pairs=[pair(b"k", 9, struct.pack("<IQQ", 8, 2, 1 << 62))]), "do not fit the file"),
        (raw_gguf(pairs=[pair(b"k", 9, struct.pack("<IQ", 9, 2))]), "array of arrays"),
        (raw_gguf(pairs=[pair(b"k", 77, b"")]), "of type 77"),
        (raw_gguf(pairs=[ARCHITECTURE]), "occurs twice"),
        (raw_gguf(pairs=[pair(b"\xff", 0, b"\0")]), "UnicodeDecodeError"),
        (raw_gguf([raw_tensor(), raw_tensor(offset=32)]), "occurs twice"),
        (raw_gguf([raw_tensor(), raw_tensor(name=b"output.weight", offset=8)]), "overlap"),
        (raw_gguf([raw_tensor(name=b"v.blk.0.x")]), "that Yoke does not know"),
        (raw_gguf([raw_tensor(kind=999)]), "stored as type 999"),
        (raw_gguf([raw_tensor((256,), kind=15)]), "Q8_K"),
        (raw_gguf([raw_tensor(kind=2)]), "not of whole Q4_0 blocks"),
        (raw_gguf([raw_tensor((1 << 40, 1 << 40))]), "has shape"),
        (raw_gguf([raw_tensor(num_dims=0)]), "0 dimensions"),
        (raw_gguf([raw_tensor(num_dims=(1 << 32) - 1)]), "4294967295 dimensions"),
        (raw_gguf(pairs=[pair(b"general.alignment", 4, struct.pack("<I", 0))]), "alignment of 0"),
        (raw_gguf(pairs=[pair(b"general.alignment", 4, struct.pack("<I", 33))]), "alignment of 33"),
        (raw_gguf(pairs=[pair(b"general.alignment", 6, struct.pack("<f", 32))]), "alignment of 32.0"),
        (raw_gguf(version=1), "of version 1"),
        (raw_gguf(version=3 << 24), "big-endian"),
        (raw_gguf(num_pairs=0), "architecture None"),
        (raw_gguf(), "holds no weights"),
        (raw_gguf([raw_tensor((8,), name=b"blk.0.attn_q.weight")]), "head_count"),
    ],
)  # fmt: skip
def test_gguf(content: bytes, pattern: str, tmp_path: Path) -> None:
    refused(save(tmp_path / "m.gguf", content), pattern)


@pytest.mark.parametrize("value", [b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x03\x00\x00\x00"])
def test_heads_that_gguf_cannot_have(value: bytes, tmp_path: Path) -> None:
    query = raw_tensor((2, 8), name=b"blk.0.attn_q.weight")
    heads = pair(b"llama.attention.head_count", 4, value)
    refused(save(tmp_path / "m.gguf", raw_gguf([query], [heads])), "head_count|not 3 heads")


def test_a_text_that_is_no_utf8_is_reported_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    save(path, raw_gguf([raw_tensor()], [pair(b"k", 8, text(b"\xff"))]))
    config = open_checkpoint(path).config
    assert "k" in config
    with pytest.raises(InputError, match=r"m\.gguf .*the value of 'k'"):
        config["k"]


def test_every_truncation_of_gguf(tmp_path: Path) -> None:
    arrays = {"output_norm.weight": tiny()["model.norm.weight"].numpy()}
    path = write_gguf(tmp_path / "m.gguf", arrays)
    content = path.read_bytes()
    last = len(content) - 16 * 2  # what pads the end belongs to no tensor
    for keep in range(0, last, 5):
        refused(save(path, content[:keep]), "truncated")
