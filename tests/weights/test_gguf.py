"""GGUF: every quantization that the package knows, against the package; architectures; metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from torch import Tensor

from base.errors import InputError
from tests.weights.block_files import random_blocks
from tests.weights.samples import HEADS, KV_HEADS, interleave, whole, write_gguf
from weights.open import open_checkpoint

ROWS, COLUMNS = 24, 1024
WRITABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0", "TQ2_0", "MXFP4")
# Not writable by the package.
BYTES_ONLY = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS"),
    *("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "NVFP4"),
)


@pytest.mark.parametrize("name", WRITABLE + BYTES_ONLY)
def test_slices_of_every_quantization(name: str, tmp_path: Path) -> None:
    kind = Kind[name]
    rng = np.random.default_rng(0)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if name in WRITABLE:
        stored = quantize(rng.standard_normal((ROWS, COLUMNS)).astype(np.float32), kind)
    else:
        stored = random_blocks(name, rng, ROWS, COLUMNS)
    wanted = dequantize(stored, kind)
    path = write_gguf(
        tmp_path / "m.gguf", {"blk.0.ffn_down.weight": stored}, {"blk.0.ffn_down.weight": kind}
    )
    entry = open_checkpoint(path).entries["model.layers.0.mlp.down_proj.weight"]
    assert (entry.shape, entry.stored_as, entry.block) == ((ROWS, COLUMNS), name, block)
    for rows in (slice(0, ROWS), slice(5, 17), slice(7, 7)):
        for columns in (slice(0, COLUMNS), slice(256, 768), slice(1, 33), slice(500, 501)):
            part = entry.read((rows, columns)).float().numpy()
            np.testing.assert_array_equal(part, wanted[rows, columns])
    if block == 1:
        assert entry.read_raw is None
        return
    assert entry.read_raw is not None
    raw = entry.read_raw((slice(3, 9), slice(block, 3 * block))).numpy()
    np.testing.assert_array_equal(raw, stored[3:9, block_bytes : 3 * block_bytes])


@pytest.mark.parametrize("name", ["llama", "granite", "smollm3", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_rows_of_query_and_key(name: str, kind: Kind, tmp_path: Path) -> None:
    """Interleaved by the converter for Llama and what is derived from it. Any rows can be asked for,
    also raw."""
    wanted: dict[str, Tensor] = {}
    arrays: dict[str, np.ndarray] = {}
    kinds: dict[str, Kind] = {}
    for letter, heads in (("q", HEADS), ("k", KV_HEADS)):
        values = torch.randn(heads * 16, 64)
        if kind == Kind.Q8_0:
            values = torch.from_numpy(dequantize(quantize(values.numpy(), kind), kind))
        bias = torch.randn(heads * 16)
        wanted[f"{letter}_proj.weight"], wanted[f"{letter}_proj.bias"] = values, bias
        if name in ("llama", "granite", "smollm3"):
            values, bias = interleave(values, heads), interleave(bias, heads)
        key = f"blk.3.attn_{letter}.weight"
        arrays[key] = values.numpy() if kind == Kind.F32 else quantize(values.numpy(), kind)
        if kind != Kind.F32:
            kinds[key] = kind
        arrays[f"blk.3.attn_{letter}.bias"] = bias.numpy()
        arrays[f"blk.3.attn_{letter}_norm.weight"] = np.ones(16, np.float32)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", arrays, kinds, name))
    for tail, values in wanted.items():
        entry = checkpoint.entries[f"model.layers.3.self_attn.{tail}"]
        columns = tuple(slice(0, size) for size in values.shape[1:])
        for rows in (slice(0, len(values)), slice(16, 32), slice(5, 23), slice(4, 4)):
            assert torch.equal(entry.read((rows, *columns)), values[rows])
        if entry.read_raw is not None:
            raw = entry.read_raw((slice(5, 23), *columns)).numpy()
            assert np.array_equal(dequantize(raw, kind), values[5:23].numpy())
    assert "model.layers.3.self_attn.q_norm.weight" in checkpoint.entries


def test_metadata_is_what_the_package_reads(tmp_path: Path, gguf: Path) -> None:
    small = write_gguf(tmp_path / "m.gguf", {"output_norm.weight": np.ones(4, np.float32)})
    for path in (small, gguf):
        fields = GGUFReader(path).fields
        theirs = {key: f.contents() for key, f in fields.items() if not key.startswith("GGUF.")}
        ours = open_checkpoint(path).config
        assert list(ours) == list(theirs)
        assert {**ours} == theirs


def test_the_embedded_model_is_what_the_package_reads(gguf: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    for tensor in GGUFReader(gguf).tensors[:12]:
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            continue
        name = next(ours for ours, stored in checkpoint.stored_names.items() if stored == tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(whole(checkpoint, name).float().numpy(), values)


@pytest.mark.parametrize(
    ("name", "array", "match"),
    [
        ("rope_freqs.weight", (2, 4), r"'rope_freqs.weight' has shape \(2, 4\)"),
        ("rope_factors_long.weight", (5000,), "must be a list of factors"),
        ("blk.0.ffn_up_exps.weight", (3, 4, 4), r"shape \(3, 4, 4\); .* 2 experts"),
        ("blk.0.ffn_up_exps.weight", (2, 4), "the matrices of 2 experts"),
        ("blk.0.attn_up_exps.weight", (2, 4, 4), "does not know"),
        ("blk.0.attn_q.1.weight", (4, 4), "does not know"),
        ("blk.0.post_ffw_norm.weight", (4,), "does not know"),
        ("blk.0.attn_norm_2.weight", (4,), "does not know"),
    ],
)
def test_tensors_that_no_model_has(
    name: str, array: tuple[int, ...], match: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {name: np.ones(array, np.float32)}, expert_count=2)
    with pytest.raises(InputError, match=match):
        open_checkpoint(path)


@pytest.mark.parametrize("count", [None, 0, 1 << 20, [2, 3]])
def test_experts_that_are_not_counted(count: int | list[int] | None, tmp_path: Path) -> None:
    arrays = {"blk.0.ffn_up_exps.weight": np.ones((2, 4, 4), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", arrays, expert_count=count)
    with pytest.raises(InputError, match=r"llama\.expert_count must be from 1 to"):
        open_checkpoint(path)


def test_fused_rows_that_are_not_heads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_qkv.weight": np.ones((9, 4), np.float32)},
                      name="falcon")  # fmt: skip
    with pytest.raises(InputError, match=r"'blk.0.attn_qkv.weight' has 9 rows, which are not 8 heads"):
        open_checkpoint(path)
    path = write_gguf(tmp_path / "n.gguf", {"blk.0.ffn_up.weight": np.ones((9, 4), np.float32)},
                      name="phi3")  # fmt: skip
    with pytest.raises(InputError, match=r"'blk.0.ffn_up.weight' has 9 rows; gate and up need"):
        open_checkpoint(path)
