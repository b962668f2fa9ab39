"""The phases of a run one by one, and which rank is named as the cause. (Whole runs: test_watch.)"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from launcher.rank import Rank
from launcher.verdict import find_cause, message_of, on_failed, on_stuck
from launcher.watch import (
    Phase,
    Run,
    Stage,
    TimeLimits,
    after_ends,
    after_signal,
    after_time,
    kill_groups,
)

GRACE_S = 60.0


@pytest.fixture
def run() -> Iterator[Run]:
    """Two ranks that run on unless a signal ends them, both with their program started."""
    ranks = [
        Rank(number, subprocess.Popen(["sleep", "300"], process_group=0), started=True)
        for number in range(2)
    ]
    yield Run(ranks, TimeLimits(GRACE_S, start_s=300.0, hang_s=120.0))
    kill_groups(ranks)


def wait_for_end(rank: Rank) -> None:
    until = time.monotonic() + 60
    while not Rank(rank.rank, rank.process).has_ended():  # `rank` itself is left as it was
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_run_without_failure_waits_for_no_deadline_but_heartbeats(run: Run) -> None:
    stage = Stage()
    assert after_ends(run, stage) == stage
    assert after_time(run, stage, time.monotonic()) == stage
    assert stage.deadline == math.inf


def test_asked_then_killed_then_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr("launcher.watch.signal_groups", lambda ranks, number: sent.append(number))
    stage = after_signal(run, Stage(), signal.SIGINT)
    assert stage.phase is Phase.ASKED and sent == [signal.SIGINT]
    assert stage.verdict is not None and stage.verdict.code == 130
    assert after_time(run, stage, stage.deadline - 1) == stage
    killed = after_time(run, stage, stage.deadline)
    assert killed.phase is Phase.KILLED and sent == [signal.SIGINT, signal.SIGKILL]
    assert killed.verdict == stage.verdict
    given_up = after_time(run, killed, killed.deadline)
    assert given_up.phase is Phase.GIVEN_UP and given_up.verdict == stage.verdict
    assert sent == [signal.SIGINT, signal.SIGKILL]


def test_a_second_signal_does_not_wait_for_the_grace(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.watch.signal_groups", lambda ranks, number: None)
    asked = after_signal(run, Stage(), signal.SIGTERM)
    killed = after_signal(run, asked, signal.SIGTERM)
    assert killed.phase is Phase.KILLED
    assert killed.deadline < time.monotonic() + GRACE_S / 2  # ranks that cannot end are given up
    assert after_signal(run, killed, signal.SIGTERM) == killed  # which no signal puts off


def test_one_that_ends_well_gives_the_others_the_grace(run: Run) -> None:
    run.ranks[1].code = 0
    stage = after_ends(run, Stage(Phase.ENDING, time.monotonic() + GRACE_S, run.ranks[1].name))
    assert after_time(run, stage, stage.deadline - 1) == stage
    asked = after_time(run, stage, stage.deadline)
    assert asked.phase is Phase.ASKED and asked.verdict is not None and asked.verdict.code == 1
    first, left = (rank.name for rank in reversed(run.ranks))
    message = f"{first} exited with code 0, and {GRACE_S:g} s later these were still running: {left}"
    assert asked.verdict.message.startswith(message)
    wait_for_end(run.ranks[0])  # it was asked


def test_of_ranks_that_ended_together_one_that_was_killed_is_the_cause(run: Run) -> None:
    failed = subprocess.Popen(["sh", "-c", "exit 7"], process_group=0)
    ranks = [Rank(2, failed, started=True), *run.ranks]
    ranks[2].process.kill()
    wait_for_end(ranks[0])
    wait_for_end(ranks[2])
    stage = after_ends(Run(ranks, run.limits), Stage())
    failed.wait()
    assert stage.verdict is not None
    assert stage.verdict.code == 128 + signal.SIGKILL
    assert stage.verdict.message.startswith(ranks[2].name)


def test_a_stuck_rank_is_not_asked_to_stop_while_it_prints_its_stack(run: Run) -> None:
    stuck, other = run.ranks
    other.seen_at += 1000
    stuck.started = False  # it has no handler for SIGQUIT yet: none is sent
    stage = after_time(run, Stage(), stuck.seen_at + 121)
    assert stage.phase is Phase.ASKED and stage.verdict is not None
    assert stuck.name in stage.verdict.message and other.name not in stage.verdict.message
    wait_for_end(other)
    assert not stuck.has_ended()


def reporting(number: int, code: int | None, /, **report: object) -> Rank:
    rank = Rank(number, subprocess.Popen(["true"]), code=code)
    rank.process.wait()
    rank.read_report(json.dumps(report).encode() + b"\n" if report else b"")
    return rank


@pytest.mark.parametrize(
    ("code", "report", "message"),
    [
        (2, {"kind": "error", "message": "the value is wrong"}, "error: the value is wrong"),
        (1, {"kind": "exception", "message": "x", "traceback": "Traceback: x\n"}, "Traceback: x"),
        (-signal.SIGBUS, {}, "was killed by SIGBUS"),
        (-signal.SIGTERM, {}, "error: rank 1 is gone"),  # the launcher's own signal is no cause
    ],
)
def test_the_cause_is_the_rank_that_failed_by_itself(
    code: int, report: dict[str, str], message: str
) -> None:
    noticed = reporting(0, 3, kind="peer", message="rank 1 is gone")
    failed = reporting(1, code, **report)
    verdict = find_cause([noticed, failed], on_failed(noticed, [failed]))
    assert verdict.code == (3 if code == -signal.SIGTERM else 128 - code if code < 0 else code)
    assert message in message_of(verdict, [noticed, failed], tracebacks=False)


def test_an_error_counts_that_was_reported_before_the_launchers_signal() -> None:
    noticed = reporting(0, 3, kind="peer", message="rank 1 is gone", code=3)
    failed = reporting(1, -signal.SIGTERM, kind="error", message="the value is wrong", code=2)
    verdict = find_cause([noticed, failed], on_failed(noticed, [failed]))
    assert verdict.code == 2
    assert message_of(verdict, [noticed, failed], False) == "error: the value is wrong"


@pytest.mark.parametrize("code", [-signal.SIGKILL, 7])
def test_one_rank_is_not_the_other_ranks(code: int) -> None:
    one, other = reporting(0, code), reporting(1, 0)
    verdict = on_failed(one, [])
    assert message_of(verdict, [one, other], False).endswith("; the other ranks were stopped")
    assert "other" not in message_of(verdict, [one], tracebacks=False)
    stuck = on_stuck([one], start_s=1.0, hang_s=0.0)
    assert message_of(stuck, [one, other], False).endswith("; all ranks were stopped")
    assert message_of(stuck, [one], tracebacks=False).endswith("(--start-timeout)")
