"""The verdict on a run that failed: exit code and message, from how its ranks ended and reported."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.rank import Rank


@dataclass(frozen=True)
class Verdict:
    """The exit code of the run and its message (empty: take it from the failed rank's report). `held`
    names the ranks that were stopped or blocked in the kernel at that time; `rest` says what became of
    the other ranks, where there are any."""

    code: int
    message: str = ""
    held: str = ""
    rest: str = ""


_OTHERS, _ALL = "; the other ranks were stopped", "; all ranks were stopped"


def on_failed(rank: Rank, running: Sequence[Rank]) -> Verdict:
    """The verdict on a rank that failed while others were running."""
    code = rank.code
    assert code is not None
    if code >= 0:
        states = [(other.name, other.held) for other in running]
        return Verdict(code, held="".join(f"; {name}: {held}" for name, held in states if held))
    number = -code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return Verdict(128 + number, f"{rank.name} was killed by {name}", rest=_OTHERS)


def on_stuck(stuck: Sequence[Rank], start_s: float, hang_s: float) -> Verdict:
    """The verdict on stuck ranks: which limit each exceeded, and its state in the kernel."""
    parts = []
    for rank in stuck:
        silent_s = time.monotonic() - rank.seen_at
        what = (
            f"sent no heartbeat for {silent_s:.0f} s (--hang-timeout {hang_s:g})"
            if hang_s and silent_s >= hang_s
            else f"had not started its program after {start_s:g} s (--start-timeout)"
        )
        held = rank.held
        parts.append(f"{rank.name} {what}" + (f"; {held}" if held else ""))
    return Verdict(1, "; ".join(parts), rest=_ALL)


def on_left(first: str, running: Sequence[Rank], grace_s: float) -> Verdict:
    """The verdict on ranks that go on although `first` exited with code 0 `grace_s` seconds ago."""
    names = ", ".join(rank.name for rank in running)
    return Verdict(
        1,
        f"{first} exited with code 0, and {grace_s:g} s later these were still running: {names}",
        rest=_ALL,
    )


def find_cause(ranks: Sequence[Rank], verdict: Verdict) -> Verdict:
    """The verdict on the rank that failed by itself, if the given one is on a rank that only noticed
    that its peer had gone: the closed connection of a rank can be noticed before its end."""
    first = next((rank for rank in ranks if rank.code == verdict.code), None)
    if verdict.message or first is None or _error_of(first).get("kind") != "peer":
        return verdict
    for rank in ranks:
        if (rank.code or 0) < 0 and rank.code not in (-signal.SIGTERM, -signal.SIGKILL):
            return on_failed(rank, ())
    for rank in ranks:
        if (code := _code_of(rank)) > 0 and _error_of(rank).get("kind") != "peer":
            return Verdict(code, "", verdict.held)
    return verdict


def _code_of(rank: Rank) -> int:
    """The exit code, 0 if the rank has not ended. If the launcher's signal reached it after it had
    reported its error, it is the code that the rank was about to end with."""
    if rank.code in (-signal.SIGTERM, -signal.SIGKILL):
        return int(_error_of(rank).get("code", rank.code))
    return rank.code or 0


def message_of(verdict: Verdict, ranks: Sequence[Rank], tracebacks: bool) -> str:
    """What is printed about a run that failed, once all pipes have been read."""
    left = "".join(
        f"; {rank.name} cannot be killed: {rank.held or 'it still runs'}"
        for rank in ranks
        if rank.code is None
    )
    if not verdict.message:
        return _reported(ranks, verdict.code, tracebacks) + verdict.held + left
    return verdict.message + (verdict.rest if len(ranks) > 1 else "") + left


def _error_of(rank: Rank) -> dict[str, Any]:
    """The error that the rank reported, empty if it reported none."""
    for line in rank.report.split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            report: dict[str, Any] = json.loads(line)
            if report["kind"]:
                return report
    return {}


def _reported(ranks: Sequence[Rank], code: int, tracebacks: bool) -> str:
    """The message from the failed ranks' reports: a user error once, else the first one's traceback."""
    failed = [rank for rank in ranks if _code_of(rank) == code]
    for rank in failed:
        error = _error_of(rank)
        if error.get("kind") in ("error", "peer"):
            return f"{error.get('traceback', '') if tracebacks else ''}error: {error['message']}"
        if error:
            return f"{rank.name} failed:\n{error['traceback'].rstrip()}"
    names = ", ".join(rank.name for rank in failed)
    return f"{names} exited with code {code}" + (_OTHERS if len(ranks) > 1 else "")
