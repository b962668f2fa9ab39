"""What a test's own run leaves behind: other runs on this machine have processes and segments too.

Every process that the tests start inherits `MARK`, a variable with a random token, in its environment.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MARK = ("YOKE_TESTS", secrets.token_hex(8))
# Of Yoke's own names, and of what DeepSpeed makes where it is used.
_PATTERNS = ("yoke-*", "*yoke_*_*", "deepspeed_*")
# A segment has a name while its ranks join; one of another run that is nobody's yet, or any more, goes.
_GONE_S = 30.0


def own_processes() -> list[psutil.Process]:
    """All processes that descend from these tests, whoever their parent is by now."""
    return [process for process in psutil.process_iter() if _is_own(process)]


def segments() -> set[Path]:
    return {path for pattern in _PATTERNS for path in Path("/dev/shm").glob(pattern)}


def expect_no_more_segments(before: set[Path]) -> None:
    """Every segment that has appeared since goes away, or is in use by a process that is not ours. What
    appears from now on is not asked about: it is another run's, whose tests follow each other."""
    deadline = time.monotonic() + _GONE_S
    left = segments() - before
    while left := {path for path in left if path.exists() and not _is_anothers(path)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _is_own(process: psutil.Process) -> bool:
    with suppress(OSError):
        return "=".join(MARK).encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    return False


def _is_anothers(path: Path) -> bool:
    """Whether somebody has it open, and no process of ours has."""
    with suppress(OSError):
        if path.stat().st_uid != os.getuid():
            return True
    holders = [process for process in psutil.process_iter() if str(path) in set(_open_files(process))]
    return bool(holders) and not any(map(_is_own, holders))


def _open_files(process: psutil.Process) -> Iterator[str]:
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{process.pid}/fd"):
            with suppress(OSError):
                yield os.readlink(entry.path)
