"""Slices of every format against the whole tensor, and files that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from base.errors import InputError
from tests.weights.samples import whole
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0, Kind.Q5_1]
HEADS, KV_HEADS, HEAD_DIM, DIM, FFN = 6, 2, 16, 96, 160


def write_gguf(path: Path, kind: Kind, seed: int = 0) -> dict[str, np.ndarray]:
    """A one-layer file of the given quantization; the values that it really stores, by GGUF name."""
    rng = np.random.default_rng(seed)
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    stored = {}
    for name, shape in {
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, DIM),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, DIM),
        "blk.0.ffn_down.weight": (DIM, FFN),
        "token_embd.weight": (50, DIM),
    }.items():
        values = rng.standard_normal(shape).astype(np.float32)
        data = values if kind == Kind.F32 else quantize(values, kind)
        stored[name] = values if kind == Kind.F32 else dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gguf_slices_are_those_of_the_dequantized_tensor(kind: Kind, tmp_path: Path) -> None:
    stored = write_gguf(tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.entries["model.embed_tokens.weight"].stored_as == kind.name
    down = "model.layers.0.mlp.down_proj.weight"
    wanted = torch.from_numpy(stored["blk.0.ffn_down.weight"])
    for rows in (slice(0, 96), slice(5, 17), slice(7, 7)):
        for columns in (slice(0, 160), slice(32, 96), slice(1, 33), slice(40, 41)):
            part = checkpoint.entries[down].read((rows, columns))
            assert torch.equal(part.float(), wanted[rows, columns])


def test_gguf_query_and_key_rows_come_back_in_the_order_of_the_halves(tmp_path: Path) -> None:
    """llama.cpp's converter interleaves the halves of each head; reading undoes it, head by head."""
    stored = write_gguf(tmp_path / "m.gguf", Kind.F32)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for letter, heads in (("q", HEADS), ("k", KV_HEADS)):
        name = f"model.layers.0.self_attn.{letter}_proj.weight"
        ours = whole(checkpoint, name)
        # What the converter does to Hugging Face's order must give back what is stored.
        halves = ours.reshape(heads, 2, HEAD_DIM // 2, DIM)
        assert torch.equal(
            halves.swapaxes(1, 2).reshape(ours.shape),
            torch.from_numpy(stored[f"blk.0.attn_{letter}.weight"]),
        )
        one_head = checkpoint.entries[name].read((slice(HEAD_DIM, 2 * HEAD_DIM), slice(0, DIM)))
        assert torch.equal(one_head, ours[HEAD_DIM : 2 * HEAD_DIM])


def test_a_truncated_gguf_is_refused(tmp_path: Path, gguf: Path) -> None:
    size = gguf.stat().st_size
    for keep in (0, 3, 20, 4000, 1_000_000, size - 100):
        short = tmp_path / f"{keep}.gguf"
        with gguf.open("rb") as source:
            short.write_bytes(source.read(keep))
        with pytest.raises(InputError, match="truncated"):
            open_checkpoint(short)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="'mamba'; supported: llama"):
        open_checkpoint(tmp_path / "m.gguf")


def make_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {"a.weight": torch.randn(12, 8), "b.weight": torch.randn(5).bfloat16()}
    save_file({"a.weight": tensors["a.weight"]}, folder / "one.safetensors")
    save_file({"b.weight": tensors["b.weight"]}, folder / "two.safetensors")
    index = {"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return tensors


def test_sharded_safetensors(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.entries.keys() == tensors.keys()
    part = checkpoint.entries["a.weight"].read((slice(3, 7), slice(2, 8)))
    assert torch.equal(part, tensors["a.weight"][3:7, 2:8])
    assert torch.equal(whole(checkpoint, "b.weight"), tensors["b.weight"])


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("two.safetensors", "../two.safetensors"))
    with pytest.raises(InputError, match="in the folder of their index"):
        open_checkpoint(tmp_path)
    index.write_text(good.replace("two.safetensors", "three.safetensors"))
    found = open_checkpoint(tmp_path)  # only who needs the tensor complains
    assert found.entries.keys() == {"a.weight"}
    assert re.search(r"three\.safetensors.* is missing", found.absent["b.weight"])
    index.write_text(good)
    data = (tmp_path / "two.safetensors").read_bytes()
    for damaged in (data[:-3], data[:10], b"\xff" * 8 + data[8:], b""):
        (tmp_path / "two.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match=r"two\.safetensors cannot be read"):
            open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing.gguf")
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match="not a checkpoint that Yoke reads"):
        open_checkpoint(tmp_path / "m.onnx")


def test_random_weights_are_the_same_however_they_are_cut() -> None:
    checkpoint = random_checkpoint({"w": (300, 200), "norm": (200,)}, seed=3)
    full = whole(checkpoint, "w")
    assert torch.equal(checkpoint.entries["w"].read((slice(50, 90), slice(10, 200))), full[50:90, 10:])
    assert abs(full.mean()) < 1e-3
    assert abs(full.std() - 0.02) < 1e-3
    # Neither rows nor columns are alike: a hash of only one of them would show here.
    assert torch.linalg.matrix_rank(full) == 200
    assert not torch.equal(full, whole(random_checkpoint({"w": (300, 200)}, seed=4), "w"))
    assert torch.equal(whole(checkpoint, "norm"), torch.ones(200))
