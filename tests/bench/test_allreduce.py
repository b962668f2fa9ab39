"""The benchmark runs, and prints what it promises. No time is checked here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import CHECKOUT

BENCH = CHECKOUT / "bench" / "allreduce.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *words], capture_output=True, text=True, timeout=300
    )


def test_two_ranks_and_two_sizes(tmp_path: Path) -> None:
    picture = tmp_path / "latency.png"
    sizes = ["8192", "1048576"]
    words = ["--samples", "2", "--sample-ms", "0.2", "--only", "none", "--no-fused"]
    result = run("--ranks", "2", "--sizes", *sizes, *words, "--plot", str(picture))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert {"hardware", "versions", "load", "samples", "missing", "worlds"} == set(report)
    assert report["missing"] == {"deepspeed": "not asked for", "oneccl": "not asked for"}
    (world,) = report["worlds"]
    assert world["ranks"] == 2 and len(world["plan"]) == 2 and world["fused"] == []
    measured = [(one["dtype"], one["bytes"]) for one in world["all_reduce"]]
    assert measured == [(d, int(s)) for d in ("float32", "bfloat16") for s in sizes]
    for one in world["all_reduce"]:
        assert set(one["times"]) == {"shm", "shm new", "gloo"}
        assert set(one["ratios"]) == {"shm new", "gloo"}
        for times in one["times"].values():
            assert 0 < times["best_us"] <= times["median_us"]
        # Two ranks: 4 bytes are read and written for each of the message, 2 at the least.
        assert one["bound_us"] == pytest.approx(2 * one["floor_us"], rel=0.01)
        assert one["of_bound"] == pytest.approx(2 * one["of_floor"], rel=0.01)
        assert one["copy_gb_per_s"] > 0 and one["gb_per_s"] > 0
    assert "2 ranks: 0 on cpus" in result.stdout and "gloo/shm" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_fused_operator_is_compared() -> None:
    words = ["--samples", "2", "--sample-ms", "0.2", "--only", "none", "--dtypes", "float32"]
    result = run("--ranks", "2", "--sizes", "8192", *words)
    assert result.returncode == 0, result.stderr
    (world,) = json.loads(result.stdout.splitlines()[-1])["worlds"]
    shapes = [one["shape"] for one in world["fused"]]
    assert shapes == [[1, 4096], [8, 4096], [128, 4096], [2048, 4096]]
    for one in world["fused"]:
        assert set(one["times"]) == {"fused", "compiled", "eager"}
        assert set(one["ratios"]) == {"compiled", "eager"}
