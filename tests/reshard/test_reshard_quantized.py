"""Quantized weights that are stored as several tensors keep every byte, at any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from base.errors import InputError
from reshard import command as reshard
from reshard.plan import dims_of
from tests.reshard.reshard_cases import run
from tests.running import refused
from tests.tensors import same, tensors_of, whole
from tests.weights import quant_float_files
from tests.weights.quant_files import DIM, LAYER, SHAPES, Kind, declared, module, save, write
from tests.weights.quant_float_files import FloatKind
from tests.weights.quant_float_files import write as write_floats
from tests.weights.same_weights import assert_same_weight
from tp.shard import plan_layout, slices_of
from weights.checkpoint import Checkpoint
from weights.formats.yoke_io import open_yoke
from weights.formats.yoke_manifest import MANIFEST, rank_file, read_manifest
from weights.open import open_checkpoint
from weights.outline import read_outline

KINDS = [
    Kind("gptq", 4, 64, True),
    Kind("gptq", 4, 32, False, (("checkpoint_format", "gptq_v2"),)),
    Kind("gptq", 8, 0, False),
    Kind("gptq", 4, 32, False, (("desc_act", True),)),
    Kind("awq", 4, 64, False),
    Kind("pack-quantized", 4, 64, True),
    Kind("pack-quantized", 4, 96, False),  # with borders inside groups for any number of ranks but 2
    Kind("pack-quantized", 8, 32, True, (("scales", torch.float32),)),
    Kind("int-quantized", 8, 0, True),
    Kind("int-quantized", 8, 0, False),
]
DOWN, OUT = f"{LAYER}mlp.down_proj", f"{LAYER}self_attn.o_proj"


def name_of(kind: Kind | FloatKind) -> str:
    if isinstance(kind, FloatKind):
        return kind.name
    return f"{kind.method}-{kind.bits}-{kind.group}-{kind.symmetric}"


def parts_of(checkpoint: Checkpoint, rank: int, size: int) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """The weights of a checkpoint with the slices that a rank loads."""
    layout = plan_layout(dims_of(checkpoint), rank, size)
    for name, entry in checkpoint.entries.items():
        yield name, slices_of(name, entry.shape, layout)


@pytest.mark.parametrize("kind", [*KINDS, *quant_float_files.KINDS], ids=name_of)
def test_there_and_back_gives_the_same_bytes(kind: Kind | FloatKind, fast: Path) -> None:
    (fast / "hf").mkdir()
    made = write(fast / "hf", kind) if isinstance(kind, Kind) else write_floats(fast / "hf", kind)
    stored, _ = made
    original = open_checkpoint(fast / "hf")
    source = fast / "hf"
    for size in (3, 5, 2):
        run("--to", size, "--verify", source, fast / f"to-{size}")
        source = fast / f"to-{size}"
        divided = open_checkpoint(source)
        assert same(dict(whole(divided)), whole(original))
        outline = read_outline(source)
        assert outline is not None and outline.weights.keys() == divided.entries.keys()
        for name, entry in divided.entries.items():
            assert outline.weights[name].scheme == entry.scheme
        for rank in range(size):
            mine = open_yoke(source, prefer=rank)
            for name, slices in parts_of(original, rank, size):
                one, other = original.entries[name], mine.entries[name]
                assert (one.stored_as, one.scheme) == (other.stored_as, other.scheme)
                assert torch.equal(one.read(slices), other.read(slices))
                if one.quant is not None and other.quant is not None:
                    rows, columns = slices
                    assert_same_weight(one.quant(rows, columns), other.quant(rows, columns))
    run("--to", 1, "--verify", source, fast / "back")
    assert same(tensors_of(fast / "back"), stored)
    assert (fast / "back/config.json").read_bytes() == (fast / "hf/config.json").read_bytes()


def test_up_and_down_gives_the_same_files(fast: Path) -> None:
    (fast / "hf").mkdir()
    write(fast / "hf", KINDS[0])
    run("--to", 3, fast / "hf", fast / "a")
    run("--to", 5, fast / "a", fast / "b")
    run("--to", 3, fast / "b", fast / "c")
    for file in sorted((fast / "a").iterdir()):
        assert file.read_bytes() == (fast / "c" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_rank_finds_all_of_its_groups_in_its_own_file(kind: Kind, fast: Path) -> None:
    """Two ranks: all borders are between groups."""
    (fast / "hf").mkdir()
    write(fast / "hf", kind)
    run("--to", 2, fast / "hf", fast / "two")
    for rank in range(2):
        (fast / f"only-{rank}").mkdir()
        for file in (fast / "two").iterdir():
            content = file.read_bytes()
            if file.name == rank_file(1 - rank, 2):  # all numbers of the other rank's file are lost
                start = 8 + int.from_bytes(content[:8], "little")
                content = content[:start] + b"\xff" * (len(content) - start)
            (fast / f"only-{rank}" / file.name).write_bytes(content)
        alone = open_yoke(fast / f"only-{rank}", prefer=rank)
        original = open_checkpoint(fast / "hf")
        for name, slices in parts_of(original, rank, 2):
            # Scattered groups: a row is read whole, from all files.
            if original.entries[name].quant is not None or not kind.get("desc_act"):
                wanted = original.entries[name].read(slices)
                assert torch.equal(alone.entries[name].read(slices), wanted), name


def test_a_rank_holds_what_its_columns_touch(fast: Path) -> None:
    (fast / "hf").mkdir()
    stored, _ = write(fast / "hf", Kind("pack-quantized", 4, 96, False))
    run("--to", 5, fast / "hf", fast / "yoke")
    layouts = [plan_layout(dims_of(open_checkpoint(fast / "hf")), rank, 5) for rank in range(5)]
    for rank, layout in enumerate(layouts):
        held = load_file(fast / "yoke" / rank_file(rank, 5))
        start, stop = layout.ffn_start, layout.ffn_stop
        for end, unit in (("weight_packed", 8), ("weight_scale", 96), ("weight_zero_point", 96)):
            wanted = stored[f"{DOWN}.{end}"][:, start // unit : -(-stop // unit)]
            assert torch.equal(held[f"{DOWN}.{end}"], wanted)
        assert torch.equal(held[f"{DOWN}.weight_shape"], stored[f"{DOWN}.weight_shape"])
    total = sum(file.stat().st_size for file in (fast / "yoke").glob("rank-*"))
    assert total < 1.3 * (fast / "hf/model.safetensors").stat().st_size


def fused(folder: Path, kind: Kind) -> dict[str, Tensor]:
    """A model whose query, key and value, and gate and up, are one module each."""
    folder.mkdir()
    stored, _ = write(folder, kind)
    rng = np.random.default_rng(1)
    for name, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
        inside = name.split(".")[0]
        rows = sum(SHAPES[f"{inside}.{part}_proj"][0] for part in parts)
        prefixes = tuple(f"{LAYER}{inside}.{part}_proj." for part in parts)
        stored = {key: value for key, value in stored.items() if not key.startswith(prefixes)}
        made, _ = module(kind, rows, DIM, rng)
        stored |= {f"{LAYER}{name}_proj.{end}": tensor for end, tensor in made.items()}
    save(folder, stored, declared(kind))
    return stored


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[4], KINDS[6], KINDS[8]], ids=name_of)
def test_fused_modules_stay_fused(kind: Kind, fast: Path) -> None:
    stored = fused(fast / "hf", kind)
    original = whole(open_checkpoint(fast / "hf"))
    run("--to", 4, "--verify", fast / "hf", fast / "a")
    run("--to", 3, "--verify", fast / "a", fast / "b")
    for path in ("a", "b"):
        assert same(whole(open_checkpoint(fast / path)), original)
    end = {"gptq": "qweight", "awq": "qweight", "int-quantized": "weight"}.get(
        kind.method, "weight_packed"
    )
    name = f"{LAYER}self_attn.qkv_proj.{end}"
    found = next(t for t in read_manifest(fast / "b").tensors if t.name == name)
    assert [len(part.ranges) for part in found.parts] == [3, 3, 3]  # query, key, value
    run("--to", 1, "--verify", fast / "b", fast / "back")
    assert same(tensors_of(fast / "back"), stored)


def test_dequantize_writes_a_plain_model(fast: Path) -> None:
    (fast / "hf").mkdir()
    write(fast / "hf", KINDS[0])
    original = whole(open_checkpoint(fast / "hf"))
    wanted = {
        name: tensor.bfloat16() if "_proj" in name else tensor for name, tensor in original.items()
    }
    run("--to", 3, "--dequantize", "--verify", fast / "hf", fast / "yoke")
    run("--to", 1, "--dequantize", "--verify", fast / "hf", fast / "plain")
    for path in ("yoke", "plain"):
        assert same(whole(open_checkpoint(fast / path)), wanted)
        assert "quantization_config" not in json.loads((fast / path / "config.json").read_text())
    assert "quantization_config" not in open_checkpoint(fast / "yoke").config


def test_a_config_beside_config_json_is_written_into_it(fast: Path) -> None:
    """As AutoGPTQ wrote it: the copy has no such file, and needs none."""
    (fast / "hf").mkdir()
    stored, _ = write(fast / "hf", KINDS[0])
    config = json.loads((fast / "hf/config.json").read_text())
    (fast / "hf/quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (fast / "hf/config.json").write_text(json.dumps(config))
    original = whole(open_checkpoint(fast / "hf"))
    run("--to", 2, fast / "hf", fast / "a")
    run("--to", 1, fast / "a", fast / "back")
    for path in ("a", "back"):
        assert same(whole(open_checkpoint(fast / path)), original)
    assert same(tensors_of(fast / "back"), stored)


def test_what_a_dry_run_says(fast: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fast / "hf").mkdir()
    write(fast / "hf", KINDS[0])
    run("--to", 3, "--dry-run", fast / "hf", fast / "no")
    said = capsys.readouterr().out
    assert "quantized tensors are copied unchanged: gptq int4-g64" in said
    assert "query heads  KV heads" in said and "0-1          0" in said
    assert "replicated KV heads: none" in said


# What is wrong with a folder.


def damaged(folder: Path, tensor_name: str, /, **values: Any) -> str:
    """What is said of a folder whose manifest has other values for a tensor."""
    good = (folder / MANIFEST).read_text()
    manifest = json.loads(good)
    found = next(tensor for tensor in manifest["tensors"] if tensor["name"] == tensor_name)
    found |= {key: value(found[key]) for key, value in values.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError) as caught:
        whole(open_checkpoint(folder))
    (folder / MANIFEST).write_text(good)
    return str(caught.value)


def test_manifests_that_cannot_be_true_are_refused(fast: Path) -> None:
    stored = fused(fast / "hf", KINDS[0])
    run("--to", 3, fast / "hf", folder := fast / "yoke")
    qkv = f"{LAYER}self_attn.qkv_proj.qweight"
    assert stored[qkv].shape == (24, 384)
    digest = "0" * 64

    def parts(*bounds: int) -> dict[str, Any]:
        return {"parts": lambda given: [[0, *bounds, digest], *given[1:]]}

    assert "ranges that are not in order" in damaged(folder, qkv, **parts(0, 64, 256, 288, 192, 224))
    assert "ranges that are not in order" in damaged(folder, qkv, **parts(0, 64, 60, 224))
    assert "are not a part of it" in damaged(folder, qkv, **parts(0, 64, 192, 192, 288, 320))
    assert "are not a part of it" in damaged(folder, qkv, **parts(-8, 64, 192, 224, 288, 320))
    assert "are not a part of it" in damaged(folder, qkv, **parts(0, 64, 192, 224, 288, 500))
    assert "do not cover it" in damaged(folder, qkv, **parts(0, 60, 192, 224, 288, 320))
    assert "copy it again" in damaged(folder, qkv, **parts(0, 72, 192, 224, 288, 320))
    blocks = {"format": "Q4_0", "elements": 32, "bytes": 18}
    assert "and has blocks" in damaged(folder, qkv, blocks=lambda _: blocks)
    assert "disagree on" in damaged(folder, qkv, name=lambda name: name.replace("qweight", "qweighs"))
    assert "is listed twice" in damaged(folder, qkv, name=lambda _: f"{DOWN}.qweight")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "source_format": "gguf"}))
    with pytest.raises(InputError, match="'gguf' has none of"):
        open_checkpoint(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no quantization_config"):
        open_checkpoint(folder)


def test_copies_that_differ_are_not_merged(fast: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scale of a group that a border cuts is in two files."""
    (fast / "hf").mkdir()
    write(fast / "hf", Kind("pack-quantized", 4, 96, True))
    run("--to", 3, fast / "hf", fast / "yoke")
    file = fast / "yoke" / rank_file(1, 3)
    held = load_file(file)
    name = f"{OUT}.weight_scale"
    parts = next(t for t in read_manifest(fast / "yoke").tensors if t.name == name).parts
    assert [part.ranges for part in parts] == [((0, 1),), ((0, 2),), ((1, 2),)]
    held[name][5, 0] += 1
    offset = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    save_file(held, fast / "other.safetensors", offset["__metadata__"])
    content = bytearray(file.read_bytes())
    start = len(content) - max(item["data_offsets"][1] for key, item in offset.items() if key[0] != "_")
    first, last = (start + at for at in offset[name]["data_offsets"])
    content[first:last] = held[name].view(torch.uint8).numpy().tobytes()
    file.write_bytes(content)
    said = refused(reshard.main, capsys, "--to", 1, fast / "yoke", fast / "no")
    assert name in said and "ranks 0 and 1 hold copies" in said and not (fast / "no").exists()
