"""However a run ends, nothing is half done: killed, interrupted, out of space, with another."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from base.errors import InputError
from reshard import command as reshard
from tests.reshard.reshard_cases import (
    SMALL,
    run,
    small,
    write_hf,
)
from tests.running import CHECKOUT, refused, wait_for_files
from weights import output as reshard_output
from weights.open import open_checkpoint


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Some 430 MB: a second or more of work, and more than a process of bounded size may hold."""
    folder = tmp_path_factory.mktemp("large")
    config = replace(SMALL, dim=2048, num_layers=4, head_dim=128, ffn_dim=5632, vocab_size=16000)
    yield write_hf(folder / "hf", config)
    shutil.rmtree(folder)


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tp.reshard", *map(str, words)]
    return subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)


def partials(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.partial-*"))


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_loads_and_the_next_one_clears_up(
    large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for attempt in range(4):
        process = start("--to", 8, large, out)
        wait_for_files(tmp_path, ".*.partial-*/rank-*", process)
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
    wait_for_files(tmp_path, ".*.partial-*/rank-*", process)
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
        said = refused(reshard.main, capsys, "--to", 4, tmp_path / "hf", disk / "out")
        assert "256.0 KiB free" in said and "needs" in said
        monkeypatch.setattr(reshard, "check_space", lambda folder, needed: None)
        said = refused(reshard.main, capsys, "--to", 4, tmp_path / "hf", disk / "out")
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
