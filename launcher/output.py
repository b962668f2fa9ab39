"""The output of ranks: rank 0's goes straight to the terminal, the others' lines get their rank first.

With a log folder, every rank's output is also written to `rank-N.log`. If the launcher has a terminal,
rank 0 then writes through a pseudo-terminal, so that its progress bars still work.
"""

from __future__ import annotations

import errno
import os
import pty
import stat
import sys
import termios
import tty
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from base.errors import LaunchError
from base.streams import OutputError, silence

Sink = Callable[[bytes], None]


def open_log(folder: Path, rank: int) -> IO[bytes]:
    """Create `folder/rank-N.log`, readable by this user alone: it holds prompts and answers. Raises
    LaunchError, also if the path is a link or another user's file: the text could end up anywhere."""
    path = folder / f"rank-{rank}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            _check_own(path)
            path.unlink()
        return open(path, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600))
    except OSError as error:
        raise LaunchError(f"--log-dir {folder} cannot be written ({error.strerror})") from error


def _check_own(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        what = "is not a plain file" if found.st_uid == os.geteuid() else "is another user's"
        raise LaunchError(f"--log-dir: {path} {what}: remove it, or give another folder")


def open_channel(terminal: bool) -> tuple[int, int]:
    """A (read, write) pair of descriptors for a rank's output: a pipe, or a pseudo-terminal."""
    if not terminal:
        return os.pipe()
    master, slave = pty.openpty()
    tty.setraw(slave)  # only the real terminal translates line ends
    with suppress(termios.error):
        termios.tcsetwinsize(slave, termios.tcgetwinsize(sys.stdout.fileno()))
    return master, slave


def whole_lines(rank: int, stream: IO[str], log: IO[bytes] | None) -> Sink:
    """A sink that passes on whole lines, with the rank before each. An unfinished line is passed on at
    the end of the output (an empty chunk)."""
    rest = b""

    def write(chunk: bytes) -> None:
        nonlocal rest
        if log is not None:
            _keep(log, chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            lines.append(rest)
        _pass_on(stream, b"".join(b"[rank %d] %b\n" % (rank, line) for line in lines))

    return write


def untouched(stream: IO[str], log: IO[bytes]) -> Sink:
    """A sink that passes on every byte at once, and writes a copy to the log."""

    def write(chunk: bytes) -> None:
        _keep(log, chunk)
        _pass_on(stream, chunk)

    return write


def _pass_on(stream: IO[str], data: bytes) -> None:
    """Write the bytes unchanged: the rank chose their encoding. If nobody reads the stream, rank 0
    notices and ends the run. Raises OutputError if stdout cannot be written."""
    try:
        stream.buffer.write(data)  # type: ignore[attr-defined]
        stream.flush()
    except OSError as error:
        if stream is sys.stdout and error.errno != errno.EPIPE:
            raise OutputError(error.errno, error.strerror) from error
        silence(stream)


def _keep(log: IO[bytes], data: bytes) -> None:
    """Write all of `data` to a log. Raises LaunchError."""
    try:
        while data:
            data = data[log.write(data) :]
    except OSError as error:
        raise LaunchError(f"{log.name} cannot be written ({error.strerror})") from error
