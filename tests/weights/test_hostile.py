"""Files that lie: one clear message (InputError) that names the file, and neither a crash, a hang, an
allocation of what a header claims, nor anything executed.

Each case is opened in this process under a limit of memory, so that a believed claim fails here.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from samples import (
    CONFIG,
    PARAMS,
    llama,
    tiny,
    write_bin,
    write_gguf,
    write_json,
    write_meta,
    write_safetensors,
)

from weights.checkpoint import open_checkpoint
from weights.errors import InputError

HUGE = (1 << 60, (1 << 64) - 1, 1 << 63, 100 << 30)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Room for 2 GiB more than this process has mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for entry in checkpoint.entries.values():
        entry.read(tuple(slice(0, size) for size in entry.shape))


def refused(path: Path, pattern: str, names: Path | None = None) -> None:
    """Opening `path` (and reading all there is) must be refused, in words that name the file."""
    with pytest.raises(InputError, match=pattern) as caught:
        read_all(path)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert (names or path).name in message, message
    assert len(message) < 1000 and "\n" not in message
    if "MemoryError" in message:
        raise AssertionError(f"a claimed size was believed: {message}")


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- any path ---------------------------------------------------------------------------------------

ALL_NAMES = ("m.gguf", "m.safetensors", "m.pth", "m.bin", "m.pt", "consolidated.00.pth")


@pytest.mark.parametrize("name", ALL_NAMES)
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_json(tmp_path / "params.json", PARAMS)
    refused(path, "does not exist")
    path.symlink_to(path)
    refused(path, "symbolic links|does not exist")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    refused(path, "is a link to a file that does not exist")
    path.unlink()
    os.mkfifo(path)
    refused(path, "a device or a pipe")
    path.unlink()
    path.mkdir()
    refused(path, "no other weights")
    path.rmdir()
    refused(save(path, b""), "it is empty")
    for junk in (b"x", b"\0" * 100, b"PK\x03\x04" + b"\0" * 40, b"\xff" * 1000, b"{}"):
        refused(save(path, junk), "cannot be read as")


def test_a_folder_of_folders(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "it is a folder")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300 + ".gguf")
    with pytest.raises(InputError, match=r"cannot be read|does not exist"):
        open_checkpoint(path)


def test_what_is_in_a_config(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "m", tiny())
    config = folder / "config.json"
    for content, pattern in {
        b"": "empty",
        b"[]": "must hold a JSON object",
        b"{": "not valid JSON",
        b"\xff\xfe": "not valid JSON",
        b'{"a": NaN}': "NaN is not allowed",
        b'{"a": -Infinity}': "-Infinity is not allowed",
        b'{"a": 1e999}': "too large",
        b'{"a": ' + b"9" * 5000 + b"}": "5000 digits",
        b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}": "nested too deeply",
        b'{"a": ' * 100_000: "nested too deeply",
    }.items():
        config.write_bytes(content)
        refused(folder, pattern, config)
    config.unlink()
    refused(folder, r"config\.json does not exist")
    config.symlink_to("config.json")
    refused(folder, "symbolic links|does not exist", config)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_what_an_index_names(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    if form == "bin":
        write_bin(folder, tiny(), 2)
        index = folder / "pytorch_model.bin.index.json"
        good = "pytorch_model-00001-of-00002.bin"
    else:
        write_safetensors(folder, tiny())
        index = folder / "model.safetensors.index.json"
        good = "model.safetensors"
    names = list(tiny())
    for place, pattern in {
        "../m/" + good: "beside their index",
        "/etc/passwd": "beside their index",
        "..": "beside their index",
        "": "beside their index",
        ".": "beside their index",
        "a\0b": "is missing",
        "\ud800": "is missing",
        "x" * 5000: "is missing",
        "nothing.bin": "is missing",
    }.items():
        write_json(index, {"weight_map": {names[0]: place}})
        refused(folder, pattern, index)
    for content in ({}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {}}):
        write_json(index, content)
        refused(folder, "weight_map", index)
    write_json(index, {"weight_map": {"phantom": good}})
    refused(folder, "does not hold it", index)
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    refused(folder, "'a' occurs twice", index)


# --- safetensors ------------------------------------------------------------------------------------


def raw_safetensors(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def described(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        *((struct.pack("<Q", n) + b"{}" + b"\0" * 20, "header of") for n in HUGE),
        (raw_safetensors(described())[:-1], "w' lies outside the file"),
        (raw_safetensors(described()) + b"\0", "end at byte"),
        (raw_safetensors(b"[1]"), "type list"),
        (raw_safetensors(b"[" * 300_000), "nested too deeply"),
        (raw_safetensors({"w": 3}), "described by int"),
        (raw_safetensors({"w": {}}), "lacks one of"),
        (raw_safetensors(described(dtype="F4")), "dtype 'F4' is not one of"),
        (raw_safetensors(described(dtype=None)), "lacks one of"),
        (raw_safetensors(described(shape=[-4])), "shape"),
        (raw_safetensors(described(shape=[4.0])), "shape"),
        (raw_safetensors(described(shape=[True, 4])), "shape"),
        (raw_safetensors(described(shape=[1 << 47, 1 << 47])), "16 bytes for shape"),
        (raw_safetensors(described(shape=[1 << 70])), "shape"),
        (raw_safetensors(described(shape=[1] * 1000 + [4])), "1001 dimensions"),
        (raw_safetensors(described(shape=[0], offsets=[1 << 60, 1 << 60])), "outside the file"),
        (raw_safetensors(described(offsets=[-16, 0])), "offsets"),
        (raw_safetensors(described(offsets=[16, 0])), "offsets"),
        (raw_safetensors(described(offsets=[0, 16, 16])), "offsets"),
        (raw_safetensors(described(offsets=["0", 16])), "offsets"),
        (raw_safetensors(described(offsets=[1 << 62, (1 << 62) + 16])), "outside the file"),
        (raw_safetensors(b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0,16]}}'), "NaN"),
        (raw_safetensors(b'{"w": 1, "w": 2}'), "'w' occurs twice"),
        (raw_safetensors(described() | {"v": described()["w"]}), "overlap"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)  # fmt: skip
def test_safetensors(content: bytes, pattern: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    refused(save(tmp_path / "m.safetensors", content), pattern)


def test_every_truncation_of_safetensors(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "m", tiny())
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for keep in range(0, len(content), 7):
        refused(save(file, content[:keep]), "truncated")


# --- PyTorch's archives -----------------------------------------------------------------------------


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
        refused(path, r"more than weights: it asks to call '[\w.]+'.*not executed")
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
        (program(count=long(1 << 58)), "wants"),
        (program(count=long(-4)), "impossible size"),
        (program(count=long(1 << 900)), "impossible size"),
        (program(shape=long(1 << 40), stride=b"K\x00"), "does not fit"),
        (program(shape=long(1 << 62)), "shape"),
        (program(shape=long(-4)), "shape"),
        (program(shape=b"N"), "shape"),
        (program(offset=long(1 << 62)), "lies outside its storage"),
        (program(offset=long(-1)), "lies outside its storage"),
        (program(offset=b"K\x01"), "does not fit"),
        (program(stride=long(-1)), "does not fit"),
        (program(stride=long(1 << 62)), "does not fit"),
        (program(stride=b"K\x02"), "does not fit"),
        (program(stride=b"N"), "lies outside its storage"),
        (program(storage=b"DoubleStorage"), "wants 32 bytes of a record of 16"),
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
    """Three gigabytes of zeros in three megabytes; as the pickle, and as a tensor."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as opened:
        with opened.open("m/data.pkl", "w", force_zip64=True) as record:
            for _ in range(48):
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
        (patched(28, "<H", 0xFFFF), "lies outside the file"),
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


# --- Meta -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [-1, 0, "8", [], 1 << 70, 0.5, True, {}])
def test_numbers_of_params(key: str, value: object, tmp_path: Path) -> None:
    if key in ("norm_eps", "rope_theta") and value in (0.5, 1 << 70) and value is not True:
        return
    folder = write_meta(tmp_path / "m", llama(), 1, **{key: value})
    refused(folder, rf"params\.json: {key} must be", folder)


def test_params_of_another_model(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", llama(), 2)
    file = folder / "params.json"
    for changed, pattern in (
        ({"dim": 100}, "neither dim=100"),
        ({"n_heads": 8}, "different models"),
        ({"n_kv_heads": 3}, "different models"),
        ({"n_heads": 1 << 31}, "different models"),
        ({"vocab_size": -7}, "vocab_size must be"),
        ({"moe": {}}, "mixture of experts"),
        ({"use_scaled_rope": True, "rope_scaling_factor": -1}, "rope_scaling_factor must be"),
    ):
        write_json(file, PARAMS | changed)
        refused(folder, pattern, folder)
    file.unlink()
    refused(folder, r"params\.json does not exist", folder)
    write_json(file, PARAMS)
    torch.save({"norm.weight": torch.ones(4)}, folder / "consolidated.01.pth")
    refused(folder, "do not hold the same tensors", folder)


# --- GGUF -------------------------------------------------------------------------------------------


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


def test_a_text_that_is_no_utf8_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
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


def test_a_configs_heads(tmp_path: Path) -> None:
    fused = {"model.layers.0.self_attn.qkv_proj.weight": torch.ones(8, 4)}
    for value in (0, -4, "4", 4.0, None, True, 1 << 40):
        folder = write_safetensors(tmp_path / "m", fused, CONFIG | {"num_attention_heads": value})
        refused(folder, "positive integers in config.json")
