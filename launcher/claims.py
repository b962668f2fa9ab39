"""What other runs of this user are bound to: a file for each, in the user's runtime folder.

A run holds a lock (flock) on its file, which names its pid and its cpus. The kernel drops the lock with
the process, however that ends, so a file without a lock is a dead run's, and is removed. A lock on the
folder keeps two runs that start together from taking the same cores. Not here: what follows from it
(`launcher.share`); runs of other users; ranks that torchrun, srun or mpirun started.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from base.folders import runtime_home
from base.private import first_private
from launcher.machine.sysfs import format_cpu_list, parse_cpu_list
from launcher.share import Claim

_LOCK = "lock"
_PATIENCE_S = 2.0  # a process that was stopped while it held the folder's lock must not stop all others


def runs_folder() -> Path | None:
    """The folder, made if needed; None if no private one can be made: then no run is noted."""
    home = runtime_home()
    temporary = Path(tempfile.gettempdir()) / f"yoke-{os.geteuid()}" / "runs"
    with suppress(OSError):
        return first_private([None if home is None else home / "yoke" / "runs", temporary])[0]
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. If another process does not let go of it, go on without."""
    with open(folder / _LOCK, "ab", opener=_private) as file:
        until = time.monotonic() + _PATIENCE_S
        while not _has_locked(file.fileno()) and time.monotonic() < until:
            time.sleep(0.02)
        yield


def read_claims(folder: Path) -> tuple[Claim, ...]:
    """The claims of runs that live. Files of dead ones are removed."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError), open(path, "rb") as file:
            if _has_locked(file.fileno()):
                path.unlink()
                continue
            claim = json.loads(file.read())
            found.append(Claim(int(claim["pid"]), parse_cpu_list(claim["cpus"])))
    return tuple(found)


def note(folder: Path, cpus: Collection[int], stack: ExitStack) -> None:
    """Note that this process is bound to `cpus`, until `stack` is closed or the process ends."""
    path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.json"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, fd)
    stack.callback(path.unlink, missing_ok=True)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.write(fd, json.dumps({"pid": os.getpid(), "cpus": format_cpu_list(cpus)}).encode())


def _has_locked(fd: int) -> bool:
    """Whether this process has the file's lock now: no other process holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
