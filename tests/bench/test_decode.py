"""The benchmark of decode steps runs, and its breakdown adds up. No time is checked here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.breakdown import Event, overhead_us, sort_events, work_and_wait
from bench.decode import scaling, summary
from tests.running import CHECKOUT

STEP = "yoke: decode step"


def step_at(start: float, late: float) -> list[Event]:
    """A step of 100 us at `start`, and 20 us of the loop behind it."""

    def event(name: str, begin: float, size: float) -> Event:
        return Event(name, start + begin, start + begin + size, size)

    return [
        event(STEP, 0, 100),
        event("TorchDynamo Cache Lookup", 1, 5),
        event("Torch-Compiled Region: 0/0", 6, 94),
        event("yoke_kernels::linear", 10, 30),
        event("graph_1_cpp_fused_mul_3", 41, 4),
        event("yoke_kernels::write_kv", 46, 2),
        event("yoke_kernels::attend", 48, 8),
        event("yoke::all_reduce_add_rms_norm", 60, 6 + late),
        event("aten::embedding", 90, 3),
        event("aten::where", 102, 7),
    ]


def test_a_steps_parts_add_up() -> None:
    found = sort_events([*step_at(0, 0), *step_at(120, 10), *step_at(240, 0)])
    assert found.steps == 2 and found.token_us == 120
    assert found.collective_us == [6, 16]
    assert found.parts == {
        "matmuls": 30,
        "attention and cache": 10,
        "norms, rope, other kernels": 4,
        "other operators of the step": 3,
        "guards": 5,
        "calls between them (Python)": 100 - 30 - 10 - 4 - 3 - 5 - 11,
        "the loop's operators": 7,
        "the loop (Python)": 13,
    }
    assert sum(found.parts.values()) + 11 == found.token_us
    assert overhead_us(found.parts) == 120 - 30 - 10 - 11


def test_one_step_is_no_breakdown() -> None:
    with pytest.raises(ValueError, match="1 decode steps were recorded"):
        sort_events(step_at(0, 0))


def test_the_shortest_of_a_calls_times_is_work() -> None:
    calls = [[5.0, 30.0], [9.0, 4.0]]
    assert work_and_wait(calls, 0, steps=2) == (4.5, 13.0)
    assert work_and_wait(calls, 1, steps=2) == (4.5, 2.0)


def test_figures() -> None:
    found = {
        "weight_bytes": 10**9,
        "read_s": [0.08, 0.1],
        "token_s": {1: [0.1, 0.2], 8: [0.2, 0.2]},
        "profiles": {},
    }
    one, eight = summary(found, 1)["batches"]
    assert one["step_ms"] == pytest.approx([100, 150])
    assert eight["tokens_per_s"] == pytest.approx([40, 40])
    assert one["gb_per_s"] == pytest.approx([10, 10 / 1.5])
    assert one["of_read"] == pytest.approx([0.8, 0.65])
    assert one["over_first"] == [1, 1]
    assert eight["over_first"] == pytest.approx([4, 6])
    faster = summary(found | {"token_s": {1: [0.05, 0.1], 8: [0.2, 0.2]}}, 2)
    gains = scaling([summary(found, 1), faster])
    assert [gain["batch"] for gain in gains] == [1, 8]
    assert gains[0]["ranks"] == [1, 2]
    assert gains[0]["speedup"] == pytest.approx([2, 2])


@pytest.mark.slow
def test_two_batches_and_where_the_time_goes() -> None:
    words = ["--model", "tiny", "--ranks", "2", "--batch", "1", "2", "--kv-dtype", "int8"]
    words += ["--samples", "2", "--tokens", "4", "--prompt", "3", "--eager", "--profile"]
    command = [sys.executable, str(CHECKOUT / "bench" / "decode.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert [world["ranks"] for world in report["worlds"]] == [2]
    for world in report["worlds"]:
        assert [one["batch"] for one in world["batches"]] == [1, 2]
        for one in world["batches"]:
            assert 0 < one["step_ms"][0] <= one["step_ms"][1]
            assert one["gb_per_s"][0] > 0 and one["of_read"][0] > 0
        assert list(world["profiles"]) == ["1", "2"]
        for ranks in world["profiles"].values():
            assert [one["rank"] for one in ranks] == list(range(world["ranks"]))
            for one in ranks:
                parts = one["parts"]
                assert sum(parts.values()) == pytest.approx(one["token_us"])
                assert parts["matmuls"] > 0 and parts["attention and cache"] > 0
                assert parts["collectives: work"] > 0 and parts["collectives: wait"] >= 0
                assert parts["guards"] == 0 and one["plain_us"] > 0
    assert report["scaling"] == []
    assert "2 ranks, batch of 2" in result.stdout
