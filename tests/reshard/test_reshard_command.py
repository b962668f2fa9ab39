"""The command: what it says of damaged weights, mistakes and plans."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reshard import command as reshard
from reshard import run as reshard_run
from reshard.plan import plan_reshard
from tests.reshard.reshard_cases import (
    SMALL,
    run,
    small,
    write_hf,
)
from tests.running import CHECKOUT, refused
from tests.tensors import tensors_of
from weights.formats.yoke_manifest import rank_file
from weights.open import open_checkpoint


def test_copies_that_differ_are_named(fast: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(fast / "hf", SMALL)
    run("--to", 16, fast / "hf", fast / "yoke")
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.norm.weight"):
        shutil.copytree(fast / "yoke", fast / "bad")
        change(fast / "bad" / rank_file(5, 16), name)
        said = refused(reshard.main, capsys, "--to", 1, fast / "bad", fast / "out")
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
        said = refused(reshard.main, capsys, "--to", ranks, "--verify", fast / "hf", fast / "out")
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
    assert says in refused(reshard.main, capsys, *words)
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
        assert says in refused(reshard.main, capsys, "--to", 2, fast / "hf", fast / "out")
    (fast / "hf" / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(fast / "hf")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    save_file(tensors, fast / "hf" / "model.safetensors")
    said = refused(reshard.main, capsys, "--to", 2, fast / "hf", fast / "out")
    assert "in one model these are equal" in said


@pytest.mark.slow
def test_the_bench_runs_and_ends_with_json(tmp_path: Path) -> None:
    command = [sys.executable, "bench/reshard.py", "0.01", "1", str(tmp_path)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["results"].keys() == {"1->4", "4->8", "8->1"}
    assert list(tmp_path.iterdir()) == []
