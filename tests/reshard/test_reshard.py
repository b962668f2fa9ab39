"""Any number of ranks to any other: the same bytes back, the same model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from comm.group import Group
from models.load import config_of, load_model
from reshard import command as reshard
from tests.reshard.reshard_cases import (
    SMALL,
    Kind,
    random_tensors,
    run,
    small,
    write_gguf,
    write_hf,
    write_meta,
)
from tests.running import refused
from tests.tensors import same, tensors_of, whole
from weights.checkpoint import Checkpoint, Entry
from weights.formats.yoke_manifest import rank_file, read_manifest
from weights.open import open_checkpoint


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    num_kv = draw(st.integers(1, 8))
    num_heads = num_kv * draw(st.integers(1, 4))
    ranks = st.integers(1, min(num_heads, 16))
    return (
        num_heads,
        num_kv,
        draw(st.integers(16, 200)),
        draw(st.integers(3, 70)),
        draw(ranks),
        draw(ranks),
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
@example(case=(16, 8, 96, 37, 8, 16))  # as Llama 2 70B: each KV head on two ranks
@example(case=(9, 3, 96, 37, 2, 1))  # as SmolLM2: the middle KV head on both ranks
@example(case=(16, 8, 101, 5, 6, 12))  # KV heads cut unevenly; odd widths; ranks without vocabulary
@example(case=(4, 1, 96, 37, 4, 3))
def test_there_and_back_gives_the_same_bytes(
    case: tuple[int, int, int, int, int, int], fast: Path
) -> None:
    num_heads, num_kv, ffn_dim, vocab_size, first, second = case
    with tempfile.TemporaryDirectory(dir=fast) as name:
        folder = Path(name)
        tensors = random_tensors(small(num_heads, num_kv, ffn_dim, vocab_size))
        source = write_hf(folder / "hf", small(num_heads, num_kv, ffn_dim, vocab_size), tensors)
        for path, ranks in (("a", first), ("b", second)):
            run("--to", ranks, source, folder / path)
            source = folder / path
            assert same(whole(open_checkpoint(source)), tensors)
            assert open_checkpoint(source).world_size == ranks
        run("--to", 1, source, folder / "back")
        assert same(tensors_of(folder / "back"), tensors)
        for file in ("config.json", "tokenizer.json"):
            assert (folder / "back" / file).read_bytes() == (folder / "hf" / file).read_bytes()


def test_8_to_16_to_8_gives_the_same_files(fast: Path) -> None:
    write_hf(fast / "hf", SMALL)
    run("--to", 8, fast / "hf", fast / "a")
    run("--from", 8, "--to", 16, "--verify", "--verify-forward", fast / "a", fast / "b")
    run("--from", 16, "--to", 8, "--verify", fast / "b", fast / "c")
    for file in sorted((fast / "a").iterdir()):
        assert file.read_bytes() == (fast / "c" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("heads", "kv", "size"), [(16, 8, 16), (9, 3, 2), (16, 8, 6), (4, 1, 4)])
def test_a_rank_loads_what_it_would_have_cut_from_the_whole(
    heads: int, kv: int, size: int, fast: Path
) -> None:
    write_hf(fast / "hf", small(heads, kv))
    run("--to", size, fast / "hf", fast / "yoke")
    original, divided = open_checkpoint(fast / "hf"), open_checkpoint(fast / "yoke")
    assert config_of(original) == config_of(divided)
    for rank in range(size):
        models = [
            load_model(config_of(checkpoint), checkpoint, Group(rank, size), torch.bfloat16)
            for checkpoint in (original, divided)
        ]
        assert same(models[0].state_dict(), models[1].state_dict())
    # And at another number of ranks than that of the files.
    for rank in range(3):
        models = [
            load_model(config_of(checkpoint), checkpoint, Group(rank, 3), torch.bfloat16)
            for checkpoint in (original, divided)
        ]
        assert same(models[0].state_dict(), models[1].state_dict())


def test_metas_8_files_of_llama_2_70b_for_16_ranks(
    fast: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The case this is for: 64 query and 8 KV heads, as published for 8 processes."""
    write_meta(fast / "meta", 8, num_heads=64, num_kv_heads=8, head_dim=8)
    source = whole(open_checkpoint(fast / "meta"))
    run("--from", 8, "--to", 16, "--verify", "--verify-forward", fast / "meta", fast / "y16")
    manifest = read_manifest(fast / "y16")
    assert (manifest.world_size, manifest.num_heads, manifest.num_kv_heads) == (16, 64, 8)
    for rank in range(16):
        held = load_file(fast / "y16" / rank_file(rank, 16))
        key = "model.layers.0.self_attn.k_proj.weight"
        assert torch.equal(held[key], source[key][rank // 2 * 8 : rank // 2 * 8 + 8])
    assert (fast / "y16" / "tokenizer.model").read_bytes() == b"not really"
    # One rank: Hugging Face's names, for their rows are in Hugging Face's order, and their config.
    run("--to", 1, "--verify", "--verify-forward", fast / "y16", fast / "hf")
    assert same(tensors_of(fast / "hf"), source)
    assert config_of(open_checkpoint(fast / "hf")) == config_of(open_checkpoint(fast / "meta"))
    run("--to", 8, fast / "y16", fast / "y8")
    assert same(whole(open_checkpoint(fast / "y8")), source)
    said = refused(reshard.main, capsys, "--from", 4, "--to", 16, fast / "meta", fast / "no")
    assert "is divided for 8 ranks" in said
    refused(reshard.main, capsys, "--from", 8, "--to", 65, fast / "meta", fast / "no")


def test_metas_files_become_a_folder_that_transformers_loads(fast: Path) -> None:
    """With nothing missing and nothing left over."""
    from transformers import LlamaForCausalLM

    write_meta(fast / "meta", 2, num_heads=4, num_kv_heads=2, head_dim=8)
    run("--to", 1, fast / "meta", fast / "hf")
    loaded: Any = LlamaForCausalLM.from_pretrained(fast / "hf", output_loading_info=True)
    theirs, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(
        {name: tensor.bfloat16() for name, tensor in theirs.state_dict().items()},
        whole(open_checkpoint(fast / "meta")),
    )


def test_fused_projections_go_back_into_one(fast: Path) -> None:
    config = small(8, 4)
    plain = random_tensors(config, torch.float16)
    fused = dict(plain)
    for i in range(config.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = [fused.pop(f"{attention}.{letter}_proj.weight") for letter in "qkv"]
        fused[f"{attention}.qkv_proj.weight"] = torch.cat(qkv)
        gate_up = [fused.pop(f"{mlp}.{part}_proj.weight") for part in ("gate", "up")]
        fused[f"{mlp}.gate_up_proj.weight"] = torch.cat(gate_up)
    write_hf(fast / "hf", config, fused)
    run("--to", 6, fast / "hf", fast / "yoke")
    assert same(whole(open_checkpoint(fast / "yoke")), plain)
    run("--to", 1, "--verify", fast / "yoke", fast / "back")
    assert same(tensors_of(fast / "back"), fused)


def test_a_bias_that_one_rank_adds_lies_with_rank_0_alone(fast: Path) -> None:
    config = small(8, 4)
    tensors = random_tensors(config)
    name = "model.layers.0.mlp.down_proj.bias"
    tensors[name] = torch.randn(config.dim)
    tensors["model.layers.0.self_attn.k_proj.bias"] = torch.randn(config.num_kv_heads * config.head_dim)
    write_hf(fast / "hf", config, tensors)
    run("--to", 8, fast / "hf", fast / "yoke")
    assert name in load_file(fast / "yoke" / rank_file(0, 8))
    assert name not in load_file(fast / "yoke" / rank_file(1, 8))
    written = next(t for t in read_manifest(fast / "yoke").tensors if t.name == name)
    assert written.axis == "first" and [part.rank for part in written.parts] == [0]
    run("--to", 1, fast / "yoke", fast / "back")
    assert same(tensors_of(fast / "back"), tensors)


def test_large_models_are_written_in_several_files(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.plan.SHARD_BYTES", 20_000)
    write_hf(fast / "hf", SMALL)
    run("--to", 4, fast / "hf", fast / "yoke")
    run("--to", 1, "--verify", fast / "yoke", fast / "back")
    files = sorted((fast / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 23_000 for file in files)
    index = json.loads((fast / "back" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(fast / "hf")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert same(whole(open_checkpoint(fast / "back")), tensors)


QUANTIZED = small(4, 2, ffn_dim=1024, vocab_size=40)


def raw(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors as they are stored."""

    def stored(entry: Entry) -> torch.Tensor:
        slices = tuple(slice(0, size) for size in entry.shape)
        return entry.read(slices) if entry.read_raw is None else entry.read_raw(slices)

    return {name: stored(entry) for name, entry in checkpoint.entries.items()}


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_quantized_tensors_are_carried_block_by_block(kind: Kind, fast: Path) -> None:
    config = replace(QUANTIZED, dim=128, head_dim=32)
    write_gguf(fast / "m.gguf", config, {}, kind)
    source = open_checkpoint(fast / "m.gguf")
    run("--to", 3, "--verify", "--verify-forward", fast / "m.gguf", fast / "y3")
    run("--to", 4, fast / "y3", fast / "y4")
    run("--to", 1, "--verify-forward", fast / "y4", fast / "y1")
    for path in ("y3", "y4", "y1"):
        again = open_checkpoint(fast / path)
        assert again.entries["model.layers.0.mlp.down_proj.weight"].stored_as == kind.name
        assert same(raw(again), raw(source))
        assert same(whole(again), whole(source))
        # A cut in the middle of blocks, as another number of ranks makes it.
        part = (slice(3, 90), slice(17, 1001))
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(again.entries[name].read(part), source.entries[name].read(part))
    assert (
        sum(file.stat().st_size for file in (fast / "y4").glob("rank-*"))
        < 1.3 * (fast / "m.gguf").stat().st_size
    )
