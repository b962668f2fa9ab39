"""A small process that outlives the launcher by a moment, to clean up where it could not.

The kernel kills the ranks of a launcher that dies of SIGKILL (`bind.die_with_parent`), but not what
they had started, and shared memory that had a name keeps it. This process reads the launcher's pipe:
the process groups of the ranks, a line each, then "done". If the pipe ends without that, it kills the
groups and removes the run's segments. Started as a script, with nothing but the standard library, it
detaches itself: the launcher's children are the ranks and nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def main(session: str) -> int:
    if os.fork():
        os._exit(0)
    os.setsid()  # a Ctrl-C at the terminal is not for this process
    groups = []
    for line in sys.stdin:
        if line.strip() == "done":
            return 0
        groups.append(int(line))
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    remove_segments(session)
    return 0


def remove_segments(session: str) -> None:
    """Ranks unlink their segment as soon as all have mapped it; this is for those killed before."""
    # The second pattern is of what DeepSpeed makes where it is used.
    for pattern in (f"yoke-{session}*", f"*yoke_{session}_*"):
        for segment in Path("/dev/shm").glob(pattern):
            segment.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
