"""A small process that outlives the launcher briefly and cleans up if the launcher was killed.

If the launcher dies of SIGKILL, the kernel kills its ranks (`bind.die_with_parent`). It does not kill
what they had started, and named shared-memory segments stay. This process reads the launcher's pipe:
the session token, the process groups of the ranks, one a line, then "done". If the pipe ends without
"done", it kills what is left of the groups and removes the run's segments. It is started as a script,
uses only the standard library, and detaches itself, so that the launcher's only children are the ranks.

The token comes through the pipe, since every user can read a command line. A group's number may belong
to other processes by then. So a process is killed only if the run's mark is in its environment, and
through a descriptor (pidfd) of exactly that process.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

MARK = "YOKE_RUN"  # the environment variable that marks a run's processes
_PATIENCE_S = 10.0


def main() -> int:
    if os.fork():
        os._exit(0)
    os.setsid()  # a Ctrl-C at the terminal must not reach this process
    lines = [line.strip() for line in iter(sys.stdin.readline, "")]
    if not lines or lines[-1] == "done":
        return 0
    session, *groups = lines
    kill_groups({int(group) for group in groups}, session)
    remove_segments(session)
    return 0


def mark_of(session: str) -> str:
    """The value of MARK for a run. It is a hash, so it does not reveal the session token."""
    return hashlib.sha256(f"mark {session}".encode()).hexdigest()[:16]


def kill_groups(groups: Collection[int], session: str) -> None:
    """Kill the run's processes in these groups, and those that they start meanwhile."""
    entry = f"{MARK}={mark_of(session)}".encode()
    until = time.monotonic() + _PATIENCE_S
    while sum(_kill(pid, groups, entry) for pid in _pids()) and time.monotonic() < until:
        time.sleep(0.01)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _kill(pid: int, groups: Collection[int], entry: bytes) -> bool:
    """Kill the process if it belongs to the run; whether it did, and was alive."""
    with suppress(OSError):
        if os.getpgid(pid) not in groups:
            return False
        process = os.pidfd_open(pid)
        try:
            # Read after opening the descriptor: if the pid has been reused since, no signal is sent.
            variables = Path(f"/proc/{pid}/environ").read_bytes()
            if os.getpgid(pid) in groups and entry in variables.split(b"\0"):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                return True
        finally:
            os.close(process)
    return False


def remove_segments(session: str) -> None:
    """Remove the segments of ranks that were killed before they could unlink them (they do so as soon
    as all have mapped the segment). Files of other users with such a name are left alone."""
    # The second pattern matches the segments of DeepSpeed (--comm deepspeed).
    for pattern in (f"yoke-{session}*", f"*yoke_{session}_*"):
        for segment in Path("/dev/shm").glob(pattern):
            with suppress(OSError):
                if segment.lstat().st_uid == os.geteuid():
                    segment.unlink()


if __name__ == "__main__":
    sys.exit(main())
