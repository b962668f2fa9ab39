"""GGUF's blocks: every byte is kept, and a border between ranks may be inside a block of 256."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base.errors import InputError
from reshard import command as reshard
from reshard import plan
from reshard.plan import dims_of
from tests.reshard.reshard_cases import Kind, run, small, write_gguf
from tests.running import refused
from tests.tensors import same, whole
from tests.weights.same_weights import assert_same_weight
from tp.shard import plan_layout, slices_of
from weights.checkpoint import Checkpoint, Entry
from weights.formats.yoke_io import open_yoke
from weights.formats.yoke_manifest import MANIFEST, rank_file, read_manifest
from weights.open import open_checkpoint
from weights.schemes import GGUF_SCHEMES

DOWN = "model.layers.0.mlp.down_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"
# 4 heads of 64 are one block of 256; the MLP has 3 blocks and is cut at multiples of 32.
CONFIG = replace(small(4, 2, ffn_dim=768, vocab_size=40), dim=256, head_dim=64, num_layers=1)


def raw(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors as they are stored."""

    def stored(entry: Entry) -> Tensor:
        slices = tuple(slice(0, size) for size in entry.shape)
        return entry.read(slices) if entry.read_raw is None else entry.read_raw(slices)

    return {name: stored(entry) for name, entry in checkpoint.entries.items()}


def ranges_of(folder: Path, name: str) -> list[tuple[tuple[int, int], ...]]:
    found = next(tensor for tensor in read_manifest(folder).tensors if tensor.name == name)
    return [part.ranges for part in found.parts]


def assert_same_parts(source: Checkpoint, folder: Path, size: int) -> None:
    """Assert that each of `size` ranks loads what it would have cut from the source."""
    for rank in range(size):
        layout = plan_layout(dims_of(source), rank, size)
        divided = open_yoke(folder, prefer=rank)
        for name, entry in source.entries.items():
            slices, other = slices_of(name, entry.shape, layout), divided.entries[name]
            assert torch.equal(entry.read(slices), other.read(slices)), name
            assert (entry.stored_as, entry.scheme) == (other.stored_as, other.scheme)
            if entry.quant is not None and entry.scheme is not None and other.quant is not None:
                rows, columns = slices
                if entry.scheme.can_cut(columns.start, columns.stop):
                    assert_same_weight(entry.quant(rows, columns), other.quant(rows, columns))


@pytest.mark.parametrize("form", sorted(GGUF_SCHEMES))
def test_there_and_back_gives_the_same_bytes(form: str, fast: Path) -> None:
    write_gguf(fast / "m.gguf", CONFIG, {}, Kind.__members__[form])
    source = open_checkpoint(fast / "m.gguf")
    last = fast / "m.gguf"
    for size in (3, 2, 4, 1):
        run("--to", size, "--verify", last, fast / f"to-{size}")
        last = fast / f"to-{size}"
        again = open_checkpoint(last)
        assert again.entries[DOWN].stored_as == form
        assert same(raw(again), raw(source))
        assert_same_parts(source, last, size)
        # Slices that are not those of a rank, with borders inside blocks.
        part = (slice(3, 90), slice(17, 701))
        assert torch.equal(again.entries[DOWN].read(part), source.entries[DOWN].read(part))
    assert ranges_of(fast / "to-2", OUT) == [((0, 128),), ((128, 256),)]


def test_both_neighbors_hold_the_block_that_their_border_cuts(
    fast: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(fast / "m.gguf", CONFIG, {}, Kind.Q4_K)
    run("--to", 3, fast / "m.gguf", fast / "y3")
    # 24 units of 32: borders at 256 and 512, between blocks; 4 ranks cut the second block in two.
    assert ranges_of(fast / "y3", DOWN) == [((0, 256),), ((256, 512),), ((512, 768),)]
    run("--to", 4, fast / "m.gguf", fast / "y4")
    assert ranges_of(fast / "y4", DOWN) == [((0, 192),), ((192, 384),), ((384, 576),), ((576, 768),)]
    manifest = read_manifest(fast / "y4")
    down = next(tensor for tensor in manifest.tensors if tensor.name == DOWN)
    shapes = [down.part_shape(part) for part in down.parts]
    assert shapes == [(256, 144), (256, 288), (256, 288), (256, 144)]
    # One of the copies is changed: they are compared before they are written once.
    file = fast / "y4" / rank_file(2, 4)
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    at = start + json.loads(content[8:start])[DOWN]["data_offsets"][0]
    content[at + 7] ^= 1
    file.write_bytes(content)
    said = refused(reshard.main, capsys, "--to", 2, fast / "y4", fast / "no")
    assert DOWN in said and "ranks 1 and 2 hold copies" in said and not (fast / "no").exists()


def test_dequantize_writes_bf16(fast: Path) -> None:
    write_gguf(fast / "k.gguf", CONFIG, {}, Kind.Q6_K)
    run("--to", 2, "--dequantize", "--verify", fast / "k.gguf", fast / "bf16")
    source = whole(open_checkpoint(fast / "k.gguf"))
    assert torch.equal(whole(open_checkpoint(fast / "bf16"))[OUT], source[OUT].to(torch.bfloat16))


def test_folders_of_version_1_are_read(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They had borders at the edges of blocks, so other borders than a loader's."""
    config = replace(CONFIG, ffn_dim=1024)
    write_gguf(fast / "m.gguf", config, {"attn_output": Kind.Q8_0}, Kind.Q4_K)
    with monkeypatch.context() as patched:
        patched.setattr(plan, "plan_layout", partial(plan_layout, ffn_unit=256))
        run("--to", 3, fast / "m.gguf", fast / "old")
    assert ranges_of(fast / "old", DOWN) == [((0, 256),), ((256, 512),), ((512, 1024),)]
    manifest = json.loads((fast / "old" / MANIFEST).read_text())
    (fast / "old" / MANIFEST).write_text(json.dumps({**manifest, "version": 1}))
    source = open_checkpoint(fast / "m.gguf")
    assert same(raw(open_checkpoint(fast / "old")), raw(source))
    assert_same_parts(source, fast / "old", 3)
    run("--to", 4, "--verify", fast / "old", fast / "new")
    assert same(raw(open_checkpoint(fast / "new")), raw(source))


def test_manifests_of_blocks_that_cannot_be_true_are_refused(fast: Path) -> None:
    write_gguf(fast / "m.gguf", CONFIG, {}, Kind.Q4_K)
    run("--to", 4, fast / "m.gguf", folder := fast / "y4")
    good = json.loads((folder / MANIFEST).read_text())
    for bounds, says in (
        (((0, 192), (192, 384), (384, 576), (575, 768)), "starts at 575, not at 576"),
        (((0, 192), (192, 384), (384, 576), (600, 768)), "starts at 600, not at 576"),
        # Rank 2 would hold a block less than its file does.
        (((0, 200), (200, 400), (400, 500), (500, 768)), rank_file(2, 4)),
        (((0, 192), (192, 384), (384, 576), (576, 1024)), "are not a part of it"),
    ):
        manifest = json.loads(json.dumps(good))
        found = next(tensor for tensor in manifest["tensors"] if tensor["name"] == DOWN)
        found["parts"] = [[i, *part, "0" * 64] for i, part in enumerate(bounds)]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(InputError) as caught:
            open_checkpoint(folder)
        assert says in str(caught.value)
