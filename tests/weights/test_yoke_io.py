"""Yoke's own form: what is written is read back, only by those who need it, and nothing is believed."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from base.errors import InputError
from reshard import command as reshard
from reshard.plan import plan_reshard
from tests.reshard.reshard_cases import SMALL, random_tensors, small, write_hf
from tests.tensors import same, whole
from tp.heads import split_heads
from tp.shard import plan_layout, slices_of
from weights.formats.yoke_io import open_folder, open_yoke
from weights.formats.yoke_manifest import MANIFEST, rank_file, read_manifest, to_json
from weights.open import open_checkpoint
from weights.writer import DTYPES, SafetensorsFile, Tensors, digest_of

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 KV heads on 16 ranks, from a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("yoke")
    write_hf(folder / "hf", SMALL)
    assert reshard.main(["--to", "16", str(folder / "hf"), str(folder / "yoke")]) == 0
    return folder / "yoke"


@pytest.fixture
def yoke(made: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    shutil.copytree(made, tmp_path / "yoke")
    return tmp_path / "yoke"


# The writer.


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=3)), max_size=8
    )
)
def test_files_are_what_the_library_reads(
    specs: list[tuple[str, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {}
    for i, (dtype, shape) in enumerate(specs):
        count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        values = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), dtype=torch.uint8)
        tensors[f"tensor é {i}"] = values.view(DTYPES[dtype]).reshape(shape)
    contents = Tensors(
        {name: (specs[i][0], tuple(specs[i][1])) for i, name in enumerate(tensors)}, {"format": "pt"}
    )
    written = SafetensorsFile(file, contents)
    for name, tensor in reversed(tensors.items()):  # the order of writing does not matter
        pieces = list(tensor.split(2)) if tensor.dim() else [tensor]
        assert written.write(name, pieces) == digest_of(iter([tensor]))
    written.finish()
    assert file.stat().st_size == contents.file_bytes
    assert same(load_file(file), tensors)


def test_a_file_that_was_not_finished_is_none(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    written = SafetensorsFile(file, Tensors({"a": ("F32", (2,))}))
    written.write("a", [torch.ones(2)])
    written.close()
    with pytest.raises(SafetensorError):
        load_file(file)


# Reading.


def test_slices_of_any_kind(made: Path) -> None:
    tensors = random_tensors(SMALL)
    checkpoint = open_checkpoint(made)
    assert checkpoint.world_size == 16
    assert same(whole(checkpoint), tensors)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        entry = checkpoint.entries[name]
        assert entry.shape == tensor.shape
        for _ in range(8):
            slices = []
            for size in tensor.shape:
                first, last = sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist())
                slices.append(slice(first, last))
            part = entry.read(tuple(slices))
            assert torch.equal(part, tensor[tuple(slices)]) and part.dtype == tensor.dtype
            assert part.is_contiguous()


def mapped() -> set[str]:
    return {line.split("/")[-1] for line in Path("/proc/self/maps").read_text().splitlines()}


def test_a_rank_reads_its_own_file_and_no_other(yoke: Path) -> None:
    dims = plan_reshard(open_checkpoint(yoke), 1).dims
    for rank in (3, 15):
        checkpoint = open_yoke(yoke, prefer=rank)
        layout = plan_layout(dims, rank, 16)
        before = mapped()
        for name, entry in checkpoint.entries.items():
            entry.read(slices_of(name, entry.shape, layout))
        assert {name for name in mapped() - before if name.startswith("rank-")} == {rank_file(rank, 16)}
        del checkpoint, entry
    # Without a preference, a head that several hold comes from the lowest of them.
    before = mapped()
    open_yoke(yoke).entries[K].read((slice(4, 8), slice(0, 64)))
    assert {name for name in mapped() - before if name.startswith("rank-")} <= {rank_file(2, 16)}


def test_an_edited_config_counts(yoke: Path) -> None:
    config = json.loads((yoke / "config.json").read_text())
    (yoke / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert open_checkpoint(yoke).config["rope_theta"] == 5.0
    (yoke / "config.json").unlink()
    assert open_checkpoint(yoke).config == config


def test_the_manifest_says_what_the_model_has(made: Path) -> None:
    manifest = read_manifest(made)
    assert (manifest.num_heads, manifest.num_kv_heads, manifest.head_dim) == (16, 8, 4)
    tensor = next(tensor for tensor in manifest.tensors if tensor.name == K)
    for part in tensor.parts:
        heads = split_heads(16, 8, part.rank, 16)
        assert (part.start, part.stop) == (4 * heads.kv_start, 4 * heads.kv_stop)
    again = json.loads(to_json(manifest))
    assert again == json.loads((made / MANIFEST).read_text())


# What is wrong with a folder. Each change says with what words it is refused.

Change = Callable[[dict[str, Any]], None]


def tensor_of(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return next(tensor for tensor in manifest["tensors"] if tensor["name"] == name)


def at(path: str, value: Any) -> Change:
    """Put a value at a path such as `files.0.name`; the first step may be a tensor's name in <>."""

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        if path.startswith("<"):
            name, _, rest = path[1:].partition(">.")
            place = tensor_of(manifest, name)
        else:
            rest = path
        *steps, last = rest.split(".")
        for step in steps:
            place = place[int(step) if step.isdigit() else step]
        place[int(last) if last.isdigit() else last] = value

    return change


DIGEST = "0" * 64
HOSTILE: list[tuple[Change, str]] = [
    (at("format", "joke"), "format is 'joke'"),
    (at("version", 3), "version is 3"),
    (at("version", 0), "version is 0"),
    (at("version", True), "version is True"),
    (at("digest", "crc32"), "'crc32'"),
    (at("world_size", 8), "16 files for a world_size of 8"),
    (at("world_size", 0), "world_size must be an integer"),
    (at("world_size", -1), "world_size must be an integer"),
    (at("world_size", 16.0), "world_size must be an integer"),
    (at("world_size", 10**9), "world_size must be an integer"),
    (at("num_kv_heads", 3), "not a multiple"),
    (at("num_kv_heads", 32), "num_kv_heads must be"),
    (at("num_kv_heads", 4), "make 16"),
    (at("head_dim", 8), "make 64"),
    (at("files", {}), "files must be a list"),
    (at("files", []), "0 files"),
    (at("files.3", "rank"), "must be an object"),
    (at("files.3.name", "../hf/model.safetensors"), "it must be 'rank-00003-of-00016.safetensors'"),
    (at("files.3.name", "/etc/passwd"), "it must be 'rank-00003"),
    (at("files.3.name", "rank-00002-of-00016.safetensors"), "it must be 'rank-00003"),
    (at("files.3.name", None), "it must be 'rank-00003"),
    (at("files.3.bytes", -5), "bytes must be"),
    (at("files.3.bytes", 100), "yoke.json says 100"),
    (at("config", []), "config must be an object"),
    (at("source_format", 3), "source_format must be a string"),
    (at("tensors", None), "tensors must be a list"),
    (at("tensors.0", []), "must be an object"),
    (lambda m: m["tensors"].append(copy.deepcopy(m["tensors"][0])), "is listed twice"),
    (at(f"<{Q}>.name", ""), "name must be a string"),
    (at(f"<{Q}>.name", "__metadata__"), "name must be a string"),
    (at(f"<{Q}>.stored_name", ["x"]), "stored_name must be a string"),
    (at(f"<{Q}>.dtype", "F33"), "F33"),
    (at(f"<{Q}>.dtype", "F16"), "disagree on"),
    (at(f"<{Q}>.shape", [-64, 64]), "is not a shape"),
    (at(f"<{Q}>.shape", [64, 0]), "is not a shape"),
    (at(f"<{Q}>.shape", [64, "64"]), "is not a shape"),
    (at(f"<{Q}>.shape", [64, True]), "is not a shape"),
    (at(f"<{Q}>.shape", [64] * 9), "is not a shape"),
    (at(f"<{Q}>.shape", [64, 1 << 41]), "is not a shape"),
    (at(f"<{Q}>.shape", [64, 1 << 39, 1 << 39]), "larger than any weight"),
    (at(f"<{Q}>.shape", [64, 65]), "rank-00000-of-00016.safetensors"),
    (at(f"<{Q}>.shape", [128, 64]), "do not cover"),
    (at(f"<{Q}>.dim", 2), "dim must be"),
    (at(f"<{Q}>.dim", -1), "dim must be"),
    (at(f"<{Q}>.dim", 1), "disagree on"),
    (at(f"<{Q}>.dim", None), "it is not sharded"),
    (at(f"<{Q}>.axis", ""), "axis"),
    (at(f"<{Q}>.axis", 3), "axis"),
    (at(f"<{K}>.axis", "q"), "do not cover"),
    (at(f"<{Q}>.parts", []), "do not cover"),
    (at(f"<{Q}>.parts.1", [1, 4, 8]), "is not [rank"),
    (at(f"<{Q}>.parts.1", [1, 4, 8, 12, DIGEST]), "is not [rank"),
    (at(f"<{Q}>.parts.1", [1, 4, 6, 7, 8, DIGEST]), "has several ranges"),
    (at(f"<{Q}>.parts.1", [1, *range(8194), DIGEST]), "more than 4096"),
    (at(f"<{NORM}>.parts.1", [1, 0, 60, 61, 64, DIGEST]), "it is not sharded"),
    (at(f"<{Q}>.axis", "stored"), "is listed as a tensor of a quantized weight"),
    (at(f"<{Q}>.parts.1", [1, 4, 8, 5]), "no sha256 digest"),
    (at(f"<{Q}>.parts.1", [1, 4, 8, "xyz"]), "no sha256 digest"),
    (at(f"<{Q}>.parts.1", [16, 4, 8, DIGEST]), "does not name one of"),
    (at(f"<{Q}>.parts.1", [True, 4, 8, DIGEST]), "does not name one of"),
    (at(f"<{Q}>.parts.1", [0, 4, 8, DIGEST]), "each rank may occur once"),
    (at(f"<{Q}>.parts.1", [1, 8, 4, DIGEST]), "not a part of it"),
    (at(f"<{Q}>.parts.1", [1, -4, 8, DIGEST]), "not a part of it"),
    (at(f"<{Q}>.parts.15", [15, 60, 65, DIGEST]), "not a part of it"),
    (at(f"<{Q}>.parts.1", [1, 5, 8, DIGEST]), "starts at 5, not at 4"),
    (at(f"<{Q}>.parts.1", [1, 3, 8, DIGEST]), "starts at 3, not at 4"),
    (at(f"<{Q}>.parts.15", [15, 60, 63, DIGEST]), "end at 63, not at 64"),
    (lambda m: tensor_of(m, Q)["parts"].pop(), "end at 60, not at 64"),
    (lambda m: tensor_of(m, NORM)["parts"].pop(), "it is not sharded"),
    (at(f"<{NORM}>.axis", "first"), "it is not sharded: ranks [0] must"),
    (at(f"<{NORM}>.parts.0", [0, 0, 63, DIGEST]), "it is not sharded"),
    (
        at(f"<{Q}>.blocks", {"format": "Q4_0", "elements": 32, "bytes": 18}),
        "cannot be stored as blocks",
    ),
    (
        at(f"<{Q}>.blocks", {"format": "Q4_0", "elements": 64, "bytes": 18}),
        "there is no GGUF block format",
    ),
    (
        at(f"<{Q}>.blocks", {"format": "Q9", "elements": 32, "bytes": 18}),
        "there is no GGUF block format",
    ),
    (at(f"<{Q}>.blocks", {"format": "Q4_0", "elements": 0, "bytes": 18}), "elements must be"),
    (at(f"<{Q}>.blocks", "Q4_0"), "blocks must be an object"),
]


@pytest.mark.parametrize(("change", "says"), HOSTILE, ids=[says for _, says in HOSTILE])
def test_a_manifest_that_cannot_be_true_is_refused(change: Change, says: str, yoke: Path) -> None:
    manifest = json.loads((yoke / MANIFEST).read_text())
    change(manifest)
    (yoke / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError) as caught:
        open_checkpoint(yoke)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"format": "yoke"', "[" * 100_000, '{"version": 1e999}', "\xff", "null"]
)
def test_a_manifest_that_is_no_json_is_refused(text: str, yoke: Path) -> None:
    (yoke / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"yoke\.json"):
        open_checkpoint(yoke)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_value_is_refused_or_harmless(data: st.DataObject, made: Path) -> None:
    """Whatever stands in a manifest: reading gives the tensors that were written, or an InputError."""
    manifest = json.loads((made / MANIFEST).read_text())
    place: Any = manifest
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    place[key] = data.draw(scalars | st.lists(scalars, max_size=3))
    changed = replace_manifest(made, manifest)
    try:
        found = whole(open_yoke(changed))
    except InputError as error:
        event(str(error)[-40:])
    else:
        assert same(found, written(made))


@functools.cache
def written(made: Path) -> dict[str, torch.Tensor]:
    return whole(open_yoke(made))


def replace_manifest(made: Path, manifest: dict[str, Any]) -> Path:
    """A folder with another manifest and links to the same files."""
    folder = made.parent / "changed"
    if not folder.exists():
        folder.mkdir()
        for file in made.glob("rank-*"):
            (folder / file.name).symlink_to(file)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_files_that_do_not_go_with_the_manifest_are_refused(yoke: Path) -> None:
    good = {file.name: file.read_bytes() for file in yoke.iterdir()}
    third, fourth = rank_file(3, 16), rank_file(4, 16)

    def refused(says: str) -> None:
        with pytest.raises(InputError) as caught:
            open_checkpoint(yoke)
        assert says in str(caught.value) and third in str(caught.value)
        (yoke / third).unlink(missing_ok=True)
        (yoke / third).write_bytes(good[third])

    (yoke / third).unlink()
    refused("missing")
    (yoke / third).unlink()
    (yoke / third).mkdir()
    with pytest.raises(InputError, match="folder"):
        open_checkpoint(yoke)
    (yoke / third).rmdir()
    (yoke / third).write_bytes(good[third])
    (yoke / third).write_bytes(good[third][:-1])
    refused("copy it again")
    (yoke / third).write_bytes(good[third] + b"\0")
    refused("copy it again")
    (yoke / third).write_bytes(b"")
    refused("empty")
    (yoke / third).write_bytes(struct.pack("<Q", 1 << 62) + good[third][8:])
    refused("copy it again")
    # Another rank's file of the same size: its name says nothing, its header does.
    assert len(good[third]) == len(good[fourth])
    (yoke / third).write_bytes(good[fourth])
    refused("rank 4 of 16")
    # The same names in other shapes or dtypes, which take as many bytes.
    tensors = load_file(yoke / third)
    metadata = {"format": "pt", "yoke": "rank 3 of 16"}
    for other in (tensors[Q].reshape(64, 4), tensors[Q].view(torch.float16)):
        save_file({**tensors, Q: other.clone()}, yoke / third, metadata)
        size = (yoke / third).stat().st_size
        manifest = json.loads(good[MANIFEST])
        manifest["files"][3]["bytes"] = size
        (yoke / MANIFEST).write_text(json.dumps(manifest))
        refused(f"disagree on {Q!r}")
    (yoke / MANIFEST).write_bytes(good[MANIFEST])
    assert open_folder(yoke).manifest.world_size == 16


def test_ranks_without_vocabulary_hold_none_of_it(tmp_path: Path) -> None:
    config = replace(small(8, 8), vocab_size=5)
    write_hf(tmp_path / "hf", config)
    assert reshard.main(["--to", "8", str(tmp_path / "hf"), str(tmp_path / "yoke")]) == 0
    name = "model.embed_tokens.weight"
    parts = next(t for t in read_manifest(tmp_path / "yoke").tensors if t.name == name).parts
    assert [part.rank for part in parts] == [0, 1, 2, 3, 4]
    nothing = open_checkpoint(tmp_path / "yoke").entries[name].read((slice(5, 5), slice(0, 64)))
    assert nothing.shape == (0, 64) and nothing.dtype == torch.bfloat16
