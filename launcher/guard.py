"""A small process that outlives the launcher by a moment, to clean up where it could not.

The kernel kills the ranks of a launcher that dies of SIGKILL (`bind.die_with_parent`), but not what
they had started, and shared memory that had a name keeps it. This process reads the launcher's pipe:
the session token, the process groups of the ranks, a line each, then "done". If the pipe ends without
that, it kills what is left of the groups and removes the run's segments. Started as a script, with
nothing but the standard library, it detaches itself: the launcher's children are the ranks and nothing
else.

The token comes through the pipe, since everybody may read a command line. A group's number may be
another's by then, so a process counts as the run's only if the run's mark is in its environment, and it
is killed through a descriptor of that very process.
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

MARK = "YOKE_RUN"  # the variable by which a run's processes are known
_PATIENCE_S = 10.0


def main() -> int:
    if os.fork():
        os._exit(0)
    os.setsid()  # a Ctrl-C at the terminal is not for this process
    lines = [line.strip() for line in iter(sys.stdin.readline, "")]
    if not lines or lines[-1] == "done":
        return 0
    session, *groups = lines
    kill_groups({int(group) for group in groups}, session)
    remove_segments(session)
    return 0


def mark_of(session: str) -> str:
    """What marks the processes of a run: of its token it says nothing."""
    return hashlib.sha256(f"mark {session}".encode()).hexdigest()[:16]


def kill_groups(groups: Collection[int], session: str) -> None:
    """Kill the run's processes in these groups, and what they start meanwhile."""
    entry = f"{MARK}={mark_of(session)}".encode()
    until = time.monotonic() + _PATIENCE_S
    while sum(_kill(pid, groups, entry) for pid in _pids()) and time.monotonic() < until:
        time.sleep(0.01)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _kill(pid: int, groups: Collection[int], entry: bytes) -> bool:
    """Whether the process was one of the run's, and alive."""
    with suppress(OSError):
        if os.getpgid(pid) not in groups:
            return False
        process = os.pidfd_open(pid)
        try:
            # Read while there is the descriptor: if the number has changed hands, no signal arrives.
            variables = Path(f"/proc/{pid}/environ").read_bytes()
            if os.getpgid(pid) in groups and entry in variables.split(b"\0"):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                return True
        finally:
            os.close(process)
    return False


def remove_segments(session: str) -> None:
    """Ranks unlink their segment as soon as all have mapped it; this is for those killed before. What
    others have put there under such a name is theirs."""
    # The second pattern is of what DeepSpeed makes where it is used.
    for pattern in (f"yoke-{session}*", f"*yoke_{session}_*"):
        for segment in Path("/dev/shm").glob(pattern):
            with suppress(OSError):
                if segment.lstat().st_uid == os.geteuid():
                    segment.unlink()


if __name__ == "__main__":
    sys.exit(main())
