"""PyTorch files that lie, or hold code: refused by name, and nothing in them is executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.weights.lies import refused, save
from tests.weights.samples import tiny, write_json
from weights.open import open_checkpoint

pytestmark = pytest.mark.usefixtures("little_memory")


class Code:
    """Something that runs a command when a careless reader loads it."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_and_not_executed(protocol: int, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    trace = tmp_path / "executed"
    for code in (
        Code(os.system, f"touch {trace}"),
        Code(eval, f"open({str(trace)!r}, 'w')"),
        Code(open, str(trace), "w"),
        Code(bytearray, 1 << 40),
        Code(torch.zeros, 1 << 40),
    ):
        path = tmp_path / "m.pth"
        torch.save({"w": torch.ones(2), "x": code}, path, pickle_protocol=protocol)
        refused(path, r"not only weights: it asks to call '[\w.]+'.*does not execute")
        # The same in the form before archives, which is not read at all.
        save(path, pickle.dumps({"x": code}, protocol))
        refused(path, r"before torch 1\.6")
    assert not trace.exists()


def archive(program: bytes, records: dict[str, bytes] | None = None, method: int = 0) -> bytes:
    """An archive in torch's layout around this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        opened.writestr("m/data.pkl", program)
        for name, content in (records or {"m/data/0": b"\0" * 16}).items():
            opened.writestr(name, content)
    return buffer.getvalue()


def program(
    offset: bytes = b"K\x00",
    shape: bytes = b"K\x04",
    stride: bytes = b"K\x01",
    count: bytes = b"K\x04",
    storage: bytes = b"FloatStorage",
    key: bytes = b"X\x01\x00\x00\x000",
) -> bytes:
    """The pickle of {'w': a tensor of one dimension}, its numbers given as operations."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\x00\x00\x00storagectorch\n" + storage + b"\n" + key + b"X\x03\x00\x00\x00cpu"
        + count + b"tQ" + offset + shape + b"\x85" + stride + b"\x85\x89}tRs."
    )  # fmt: skip


def long(value: int) -> bytes:
    """An integer of any size, as an operation."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {})
    return tmp_path / "m.pth"


def test_the_archives_of_these_tests_are_read(pth: Path) -> None:
    save(pth, archive(program()))
    assert open_checkpoint(pth).entries["w"].read((slice(0, 4),)).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (program(count=long(1 << 58)), "needs"),
        (program(count=long(-4)), "impossible size"),
        (program(count=long(1 << 900)), "impossible size"),
        (program(shape=long(1 << 40), stride=b"K\x00"), "does not fit"),
        (program(shape=long(1 << 62)), "shape"),
        (program(shape=long(-4)), "shape"),
        (program(shape=b"N"), "shape"),
        (program(offset=long(1 << 62)), "is outside its storage"),
        (program(offset=long(-1)), "is outside its storage"),
        (program(offset=b"K\x01"), "does not fit"),
        (program(stride=long(-1)), "does not fit"),
        (program(stride=long(1 << 62)), "does not fit"),
        (program(stride=b"K\x02"), "does not fit"),
        (program(stride=b"N"), "is outside its storage"),
        (program(storage=b"DoubleStorage"), "needs 32 bytes of a record of 16"),
        (program(storage=b"ComplexFloatStorage"), "asks to call 'torch.ComplexFloatStorage'"),
        (program(key=b"X\x01\x00\x00\x009"), "m/data/9"),
        (program(key=b"X\x07\x00\x00\x00../../0"), r"data/\.\./\.\./0"),
        (program(key=b"K\x00"), "int where str belongs"),
        (program()[:-1], "cannot be read"),
        (b"", "cannot be read"),
        (b"\x80\x02.", "cannot be read"),
        (b"\x80\x02N.", "holds NoneType"),
        (b"\x80\x02}X\x01\x00\x00\x00wK\x01s.", "'w' is of type int"),
        (b"\x80\x02}K\x01K\x01s.", "1 is of type int"),
        (b"\x80\x02}X\x01\x00\x00\x00wK\x01sX\x01\x00\x00\x00wK\x01s.", "occurs twice"),
        (b"\x80\x02r\xff\xff\xff\xff.", "cannot be read"),
        (b"\x80\x02}r\xff\xff\xff\x7f0.", "uses POP"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "cannot be read"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "cannot be read"),
        (b"\x80\x02)" + b"\x86q\x00h\x00" * 1 + b".", "cannot be read"),
        # A key that is a tower of pairs: its hash would take 2**200 steps.
        (b"\x80\x02})" + b"q\x00h\x00\x86" * 200 + b"K\x01s.", "key of type tuple"),
        (b"\x80\x02" + b"(" * 500_000 + b".", "cannot be read"),
        (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "holds list"),
        (b"\x80\x02i__main__\nx\n.", "uses INST|cannot be read"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02cos\nsystem\n.", r"asks to call 'os\.system'"),
        (b"\x80\x02I" + b"9" * 10_000 + b"\n.", "cannot be read"),
    ],
)
def test_pickles(content: bytes, pattern: str, pth: Path) -> None:
    refused(save(pth, archive(content)), pattern)


def test_a_bomb_in_an_archive(pth: Path) -> None:
    """A gigabyte of zeros in a few megabytes, as the pickle; and a compressed tensor."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as opened:
        with opened.open("m/data.pkl", "w", force_zip64=True) as record:
            for _ in range(16):
                record.write(b"\0" * (64 << 20))
        opened.writestr("m/data/0", b"\0" * 16)
    refused(save(pth, buffer.getvalue()), "is compressed")
    refused(save(pth, archive(program(), method=zipfile.ZIP_DEFLATED)), "is compressed")


def test_archives(pth: Path) -> None:
    good = archive(program())
    central = good.index(b"PK\x01\x02")
    end = good.index(b"PK\x05\x06")

    def patched(at: int, code: str, value: int) -> bytes:
        content = bytearray(good)
        struct.pack_into(code, content, at, value)
        return bytes(content)

    for content, pattern in (
        (archive(program(), {"n/data.pkl": b"x"}), "2 files data.pkl"),
        (archive(program(), {"m/constants.pkl": b"x"}), "TorchScript"),
        (archive(program(), {"m/data/0": b"\0" * 16, "m/byteorder": b"big"}), "big-endian"),
        (archive(program(), {"m/data/0": b"\0" * 8}), "of a record of 8"),
        (patched(central + 8, "<H", 1), "is encrypted"),
        (patched(central + 20, "<I", 0xFFFFFFF0), "is compressed"),
        (patched(central + 42, "<I", 7), "not where it should be"),
        (patched(central + 42, "<I", 0x7FFFFFFF), "not where it should be"),
        (patched(end + 16, "<I", 0x7FFFFFFF), "cannot be read"),
        (patched(end + 12, "<I", 0x7FFFFFFF), "cannot be read"),
        (patched(30, "<I", 0x41414141), "has two names"),
        (patched(28, "<H", 0xFFFF), "is outside the file"),
        (patched(central + 46, "<I", 0), "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "cannot be read|Git LFS"),
    ):
        refused(save(pth, content), pattern)
    both = bytearray(good)  # two records of one length that claim the same bytes
    struct.pack_into("<II", both, central + 20, 400, 400)
    refused(save(pth, bytes(both)), "overlap|outside")


def test_every_truncation_of_an_archive(pth: Path) -> None:
    torch.save(tiny(), pth)
    content = pth.read_bytes()
    for keep in range(0, len(content), 17):
        refused(save(pth, content[:keep]), "truncated")
