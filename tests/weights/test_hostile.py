"""Files that lie: one clear message (InputError) that names the file, and neither a crash, a hang nor
an allocation of what a header claims. Here: paths, JSON, safetensors, Meta's params.
"""

from __future__ import annotations

import json
import os
import struct
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import InputError
from tests.weights.lies import refused, save
from tests.weights.samples import (
    CONFIG,
    PARAMS,
    llama,
    tiny,
    write_bin,
    write_json,
    write_meta,
    write_safetensors,
)
from weights.open import open_checkpoint

pytestmark = pytest.mark.usefixtures("little_memory")
HUGE = (1 << 60, (1 << 64) - 1, 1 << 63, 100 << 30)

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
        good = "model-00001-of-00001.safetensors"
        write_safetensors(folder, tiny())
        (folder / "model.safetensors").rename(folder / good)
        index = folder / "model.safetensors.index.json"
    names = list(tiny())
    for place, pattern in {
        "../m/" + good: "in the folder of their index",
        "/etc/passwd": "in the folder of their index",
        "..": "in the folder of their index",
        "": "in the folder of their index",
        ".": "in the folder of their index",
        "a\0b": "is missing",
        "\ud800": "is missing",
        "x" * 5000: "is missing",
        "nothing.bin": "is missing",
    }.items():
        write_json(index, {"weight_map": {names[0]: place}})
        refused(folder, pattern, index)
    contents: tuple[dict[str, Any], ...] = (
        {}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {}},
    )  # fmt: skip
    for content in contents:
        write_json(index, content)
        refused(folder, "weight_map", index)
    write_json(index, {"weight_map": {"phantom": good}})
    refused(folder, "does not hold it", index)
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    refused(folder, "'a' occurs twice", index)


def raw_safetensors(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def described(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        *((struct.pack("<Q", n) + b"{}" + b"\0" * 20, "its header has") for n in HUGE),
        (raw_safetensors(described())[:-1], "w' is outside the file"),
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


SIZES, NUMBERS = ("dim", "n_layers", "n_heads", "n_kv_heads"), ("norm_eps", "rope_theta")
WRONG: tuple[object, ...] = (-1, 0, "8", [], True, {})


@pytest.mark.parametrize(
    ("key", "value"), [*product(SIZES, (*WRONG, 1 << 70, 0.5)), *product(NUMBERS, WRONG)]
)
def test_numbers_of_params(key: str, value: object, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "m", llama(), 1, **dict[str, Any]({key: value}))
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


def test_a_configs_heads(tmp_path: Path) -> None:
    fused = {"model.layers.0.self_attn.qkv_proj.weight": torch.ones(8, 4)}
    for value in (0, -4, "4", 4.0, None, True, 1 << 40):
        folder = write_safetensors(tmp_path / "m", fused, CONFIG | {"num_attention_heads": value})
        refused(folder, "in config.json must be positive integers")
