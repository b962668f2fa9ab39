"""Any number of ranks to any other: the same bytes back, the same model, and nothing half done."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from base.errors import InputError
from comm.group import Group
from models.load import config_of, load_model
from reshard import command as reshard
from reshard import run as reshard_run
from reshard.plan import plan_reshard
from tests.reshard.reshard_cases import (
    SMALL,
    Kind,
    hf_tensors,
    random_tensors,
    same,
    small,
    whole,
    write_gguf,
    write_hf,
    write_meta,
)
from weights import output as reshard_output
from weights.checkpoint import Checkpoint, Entry
from weights.formats.yoke_manifest import rank_file, read_manifest
from weights.open import open_checkpoint

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fast() -> Iterator[Path]:
    """A folder in memory where there is one: what is measured here is not the disk's fsync."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="reshard-", dir=where) as folder:
        yield Path(folder)


def run(*words: object) -> None:
    assert reshard.main([str(word) for word in words]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run what must end with exit code 2; the one line that it says."""
    capsys.readouterr()
    assert reshard.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


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
        assert same(hf_tensors(folder / "back"), tensors)
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
    assert same(hf_tensors(fast / "hf"), source)
    assert config_of(open_checkpoint(fast / "hf")) == config_of(open_checkpoint(fast / "meta"))
    run("--to", 8, fast / "y16", fast / "y8")
    assert same(whole(open_checkpoint(fast / "y8")), source)
    said = refused(capsys, "--from", 4, "--to", 16, fast / "meta", fast / "no")
    assert "is divided for 8 ranks" in said
    refused(capsys, "--from", 8, "--to", 65, fast / "meta", fast / "no")


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
    assert same(hf_tensors(fast / "back"), fused)


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
    assert same(hf_tensors(fast / "back"), tensors)


def test_large_models_are_written_in_several_files(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.plan.SHARD_BYTES", 20_000)
    write_hf(fast / "hf", SMALL)
    run("--to", 4, fast / "hf", fast / "yoke")
    run("--to", 1, "--verify", fast / "yoke", fast / "back")
    files = sorted((fast / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 23_000 for file in files)
    index = json.loads((fast / "back" / "model.safetensors.index.json").read_text())
    tensors = hf_tensors(fast / "hf")
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
    from dataclasses import replace

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


def test_blocks_of_256_move_borders_in_the_mlp_and_not_between_heads(
    fast: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    config = replace(QUANTIZED, dim=256, head_dim=64)  # 4 heads of 64: one block of 256
    write_gguf(fast / "m.gguf", config, {"attn_output": Kind.Q8_0}, Kind.Q4_K)
    run("--to", 3, "--verify", fast / "m.gguf", fast / "y3")
    down = next(
        t for t in read_manifest(fast / "y3").tensors if t.name.endswith("0.mlp.down_proj.weight")
    )
    assert [(part.start, part.stop) for part in down.parts] == [(0, 256), (256, 512), (512, 1024)]
    source = open_checkpoint(fast / "m.gguf")
    assert same(raw(open_checkpoint(fast / "y3")), raw(source))
    for rank in range(3):  # the loader cuts where it always does, and finds its part all the same
        models = [
            load_model(config_of(source), checkpoint, Group(rank, 3), torch.float32)
            for checkpoint in (source, open_checkpoint(fast / "y3"))
        ]
        assert same(models[0].state_dict(), models[1].state_dict())
    # Heads of 64 cannot be separated inside a block.
    write_gguf(fast / "k.gguf", config, {}, Kind.Q4_K)
    said = refused(capsys, "--to", 2, fast / "k.gguf", fast / "no")
    assert "model.layers.0.self_attn.o_proj.weight" in said and "--dequantize" in said
    assert not (fast / "no").exists()
    run("--to", 2, "--dequantize", "--verify", fast / "k.gguf", fast / "bf16")
    name = "model.layers.0.self_attn.o_proj.weight"
    source = open_checkpoint(fast / "k.gguf")
    assert torch.equal(
        whole(open_checkpoint(fast / "bf16"))[name], whole(source)[name].to(torch.bfloat16)
    )


def test_copies_that_differ_are_named(fast: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(fast / "hf", SMALL)
    run("--to", 16, fast / "hf", fast / "yoke")
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.norm.weight"):
        shutil.copytree(fast / "yoke", fast / "bad")
        change(fast / "bad" / rank_file(5, 16), name)
        said = refused(capsys, "--to", 1, fast / "bad", fast / "out")
        first = 4 if "v_proj" in name else 0
        assert name in said and f"ranks {first} and 5" in said
        assert not (fast / "out").exists()
        shutil.rmtree(fast / "bad")


def change(file: Path, name: str) -> None:
    """Flip a bit of a tensor in its file."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + place + 3] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_verify_finds_what_the_disk_has_changed(
    name: str, fast: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(fast / "hf", SMALL)
    honest = reshard_run.write

    def write(plan, reader, folder, progress):  # type: ignore[no-untyped-def]
        honest(plan, reader, folder, progress)
        change(next(folder.glob("rank-00002*"), folder / "model.safetensors"), name)

    monkeypatch.setattr(reshard_run, "write", write)
    for ranks in (4, 1):
        said = refused(capsys, "--to", ranks, "--verify", fast / "hf", fast / "out")
        assert name in said and "write it again" in said
        assert [path.name for path in fast.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--form", "2", "--to", "4", "hf", "out"], "did you mean '--from'?"),
        (["--to", "x", "hf", "out"], "'x'"),
        (["--to", "0", "hf", "out"], "at least one rank"),
        (["--to", "17", "hf", "out"], "17 ranks for 16 query heads"),
        (["--from", "2", "--to", "4", "hf", "out"], "is divided for 1 rank;"),
        (["--to", "2", "nothing", "out"], "nothing"),
        (["--to", "2", "hf", "hf"], "not empty"),
        (["--to", "2", "hf", "hf/config.json"], "not a folder"),
        (["--to", "2", "hf", "no/out"], "does not exist"),
        (["--too", "2", "hf", "out"], "--help"),
    ],
)
def test_mistakes_end_with_one_line(
    words: list[str],
    says: str,
    fast: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_hf(fast / "hf", SMALL)
    monkeypatch.chdir(fast)
    assert says in refused(capsys, *words)
    assert [path.name for path in fast.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("words", "complete"),
    [
        ("", "--to 16 llama-2-70b/ llama-2-70b-16/"),
        ("--from 8 --to 16", "--from 8 --to 16 llama-2-70b/ llama-2-70b-16/"),
        ("--to 4 hf", "--to 4 hf llama-2-70b-16/"),
        ("hf out", "hf out --to 16"),
    ],
)
def test_what_is_missing_comes_with_a_complete_example(
    words: str, complete: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reshard.main(words.split()) == 2
    said = capsys.readouterr().err
    assert f"\n  python -m tp.reshard {complete}\n" in said
    assert "missing" in said and "in any other folder: yoke reshard" in said


def test_the_help_is_one_screen_and_a_dry_run_writes_nothing(
    fast: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        reshard.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 40
    write_hf(fast / "hf", SMALL)
    run("--to", 12, "--dry-run", fast / "hf", fast / "out")
    table = capsys.readouterr().out
    assert "rank-00011-of-00012.safetensors" in table
    assert "replicated KV heads: 4 of 8, up to 2 copies of one" in table
    assert [path.name for path in fast.iterdir()] == ["hf"]


def test_the_plan_says_exactly_what_is_written(fast: Path) -> None:
    write_hf(fast / "hf", small(9, 3, ffn_dim=75, vocab_size=41))
    for ranks in (1, 2, 7):
        plan = plan_reshard(open_checkpoint(fast / "hf"), ranks)
        run("--to", ranks, fast / "hf", fast / f"out{ranks}")
        for name, contents in plan.files.items():
            assert (fast / f"out{ranks}" / name).stat().st_size == contents.file_bytes


def test_a_model_whose_config_lies_about_its_heads_is_refused(
    fast: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(fast / "hf", SMALL)
    config = json.loads((fast / "hf" / "config.json").read_text())
    for heads, says in ((7, "7 heads"), ("many", "must be a positive integer"), (0, "positive")):
        (fast / "hf" / "config.json").write_text(json.dumps({**config, "num_attention_heads": heads}))
        assert says in refused(capsys, "--to", 2, fast / "hf", fast / "out")
    (fast / "hf" / "config.json").write_text(json.dumps(config))
    tensors = hf_tensors(fast / "hf")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    save_file(tensors, fast / "hf" / "model.safetensors")
    assert "in one model these are equal" in refused(capsys, "--to", 2, fast / "hf", fast / "out")


# What happens to the process: killed, interrupted, out of space, together with another.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Some 430 MB: a second or more of work, and more than a process of bounded size may hold."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("large")
    config = replace(SMALL, dim=2048, num_layers=4, head_dim=128, ffn_dim=5632, vocab_size=16000)
    yield write_hf(folder / "hf", config)
    shutil.rmtree(folder)


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tp.reshard", *map(str, words)]
    return subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)


def partials(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.partial-*"))


def wait_for_partial(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(partial.glob("rank-*") for partial in partials(folder)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_loads_and_the_next_one_clears_up(
    large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for attempt in range(4):
        process = start("--to", 8, large, out)
        wait_for_partial(tmp_path, process)
        # What the last killed run had left is gone as soon as the next one writes.
        assert len(partials(tmp_path)) == 1
        time.sleep(random.Random(attempt).random() * 0.7)
        process.kill()
        process.communicate()
        if out.exists():  # it was quicker than the signal
            shutil.rmtree(out)
            continue
        for partial in partials(tmp_path):
            with pytest.raises(InputError):
                open_checkpoint(partial)
            for file in partial.glob("*.safetensors"):
                with pytest.raises(InputError):
                    open_checkpoint(file)
    run("--to", 8, large, out)
    assert partials(tmp_path) == []
    assert open_checkpoint(out).world_size == 8


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_removes_what_was_begun(number: signal.Signals, large: Path, tmp_path: Path) -> None:
    process = start("--to", 8, large, tmp_path / "out")
    wait_for_partial(tmp_path, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said == f"reshard: stopped by {number.name}; nothing was left\n"
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_at_any_line_leaves_nothing_or_all(fast: Path) -> None:
    """Raised before each line that `new_folder` and what it calls runs, one after the other."""
    inside = {"new_folder", "_create", "_lock", "_finish", "_sync"}
    out, at, complete = fast / "out", 0, False
    while not complete:
        countdown = at = at + 1

        def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
            nonlocal countdown
            code = frame.f_code
            if code.co_filename != reshard_output.__file__ or code.co_name not in inside:
                return None
            countdown -= event == "line"
            if event == "line" and countdown == 0:
                raise reshard_output.Interrupted(signal.SIGTERM)
            return trace

        left = ""
        sys.settrace(trace)
        try:
            with reshard_output.new_folder(out) as partial:
                (partial / "file").write_text("whole")
            complete = True
        except reshard_output.Interrupted as stopped:
            left = reshard_output.left_by(stopped, out)
        finally:
            sys.settrace(None)
        found = {str(path.relative_to(fast)) for path in fast.rglob("*")}
        if complete or left == f"{out} is complete":
            assert found == {"out", "out/file"}
            shutil.rmtree(out)
        else:
            assert (left, found) == ("nothing was left", set())
    assert at > 20  # the lines of all of them were met


def test_a_living_run_keeps_its_folder(fast: Path) -> None:
    write_hf(fast / "hf", SMALL)
    other = fast / ".out.partial-0123abcd"
    other.mkdir()
    (other / "rank").write_text("somebody's")
    with (other / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("--to", 2, fast / "hf", fast / "out")
        assert other.exists()
    shutil.rmtree(fast / "out")
    stranger = fast / ".out2.partial-0123abcd"
    stranger.mkdir()
    run("--to", 2, fast / "hf", fast / "out")
    assert not other.exists() and stranger.exists()


def test_leftovers_that_are_links_are_left_alone(fast: Path) -> None:
    elsewhere = fast / "elsewhere"
    elsewhere.mkdir()
    (fast / ".out.partial-0123abcd").symlink_to(elsewhere)
    planted = fast / ".out.partial-4567cdef"
    planted.mkdir()
    (planted / ".lock").symlink_to(elsewhere / "file")
    with reshard_output.new_folder(fast / "out") as partial:
        (partial / "file").write_text("whole")
    assert list(elsewhere.iterdir()) == []
    assert (fast / "out/file").read_text() == "whole"


def test_two_runs_for_one_name_do_not_mix(fast: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that ends first has the name; the other one says so and leaves nothing."""
    write_hf(fast / "hf", SMALL)
    with (
        pytest.raises(InputError, match="could not be written"),
        reshard_output.new_folder(fast / "out"),
    ):
        run("--to", 2, fast / "hf", fast / "out")
    assert open_checkpoint(fast / "out").world_size == 2
    assert sorted(path.name for path in fast.iterdir()) == ["hf", "out"]


def test_an_empty_folder_is_taken(fast: Path) -> None:
    write_hf(fast / "hf", SMALL)
    (fast / "out").mkdir()
    run("--to", 2, fast / "hf", f"{fast / 'out'}/")
    assert open_checkpoint(fast / "out").world_size == 2


def test_a_full_disk_is_reported_before_and_while_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        write_hf(tmp_path / "hf", small(16, 8, ffn_dim=960))
        said = refused(capsys, "--to", 4, tmp_path / "hf", disk / "out")
        assert "256.0 KiB free" in said and "needs" in said
        monkeypatch.setattr(reshard, "check_space", lambda folder, needed: None)
        said = refused(capsys, "--to", 4, tmp_path / "hf", disk / "out")
        assert "No space left" in said
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


MEASURED = """
import sys
import torch, safetensors, gguf
import reshard.verify, weights.formats.safetensors_io, weights.formats.yoke_io
from reshard.command import main
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))
before = peak()
assert main(sys.argv[1:]) == 0
print(before, peak())
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_numbers_of_ranks(large: Path, tmp_path: Path) -> None:
    """Source and result are 430 MB; the process may grow by a few pieces of each alone."""
    steps = ((16, large, tmp_path / "a"), (3, tmp_path / "a", tmp_path / "b"))
    for ranks, source, out in (*steps, (1, tmp_path / "b", tmp_path / "c")):
        words = ["--to", str(ranks), "--verify", str(source), str(out)]
        result = subprocess.run(
            [sys.executable, "-c", MEASURED, *words],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=True,
        )
        before, peak = map(int, result.stdout.split())
        assert peak - before < 180, (ranks, before, peak)
    assert (tmp_path / "c" / "model.safetensors").stat().st_size == pytest.approx(
        (large / "model.safetensors").stat().st_size, rel=1e-3
    )


@pytest.mark.slow
def test_the_bench_runs_and_ends_with_json(tmp_path: Path) -> None:
    command = [sys.executable, "bench/reshard.py", "0.01", "1", str(tmp_path)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["results"].keys() == {"1->4", "4->8", "8->1"}
    assert list(tmp_path.iterdir()) == []
