"""The output of ranks: lines of different ranks never mix, and rank 0's look as if it ran alone.

The lines of ranks above 0 get their rank first. Rank 0 of our own programs writes to the launcher's
streams itself. A program of the user's (`run`) on several ranks may print a line in pieces. If rank 0's
stream is a terminal, pieces are shown at once, through a pseudo-terminal, and lines of other ranks wait
for the end of its line, for a moment. Elsewhere its lines are passed on whole.
With a log folder, every rank's output is also written to `rank-N.log`.
"""

from __future__ import annotations

import errno
import math
import os
import pty
import stat
import sys
import termios
import time
import tty
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from base.errors import LaunchError
from base.streams import OutputError, silence

Sink = Callable[[bytes], None]
_PATIENCE_S = 0.1  # how long lines of other ranks wait for the end of rank 0's
_LINE_BYTES = 1 << 20  # the longest line that is kept until it ends


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
    _set_size(slave)
    return master, slave


class UnreadError(Exception):
    """Nobody reads what rank 0 writes: its pipe is closed, so that it notices."""


@dataclass
class Outlet:
    """Where the output of all ranks meets: stdout, stderr, or both if they are one file. `unfinished`:
    on which of them rank 0 has begun a line; `waiting`: lines of other ranks that wait for its end,
    until `due`; `ended`: rank 0 will write no more; `unread`: the streams whose reader has gone."""

    unfinished: IO[str] | None = None
    waiting: list[tuple[IO[str], bytes]] = field(default_factory=list)
    due: float = math.inf
    ended: bool = False
    unread: list[IO[str]] = field(default_factory=list)


def open_outlets() -> tuple[Outlet, Outlet]:
    """Those of stdout and stderr."""
    with suppress(OSError):  # a stream without a file descriptor, as in tests
        out, err = os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())
        if os.path.samestat(out, err):
            both = Outlet()
            return both, both
    return Outlet(), Outlet()


def settle(outlet: Outlet, now: float) -> None:
    """End rank 0's line if others have waited for it long enough, and pass on what waits."""
    if not outlet.waiting or (outlet.unfinished is not None and now < outlet.due):
        return
    if outlet.unfinished is not None:
        _pass_on(outlet, outlet.unfinished, b"\n")
        outlet.unfinished = None
    for stream, lines in outlet.waiting:
        _pass_on(outlet, stream, lines)
    outlet.waiting.clear()
    outlet.due = math.inf


def whole_lines(rank: int, stream: IO[str], outlet: Outlet, log: IO[bytes] | None) -> Sink:
    """A sink that passes on whole lines, those of ranks above 0 with their rank first. The end of the
    output (an empty chunk) ends the last line too. A line that is too long to keep is divided; of rank
    0 it is passed on in pieces."""
    rest, before = bytearray(), b"[rank %d] " % rank if rank else b""

    def write(chunk: bytes) -> None:
        if log is not None:
            _keep(log, chunk)
        end = chunk.rfind(b"\n") + 1
        lines = bytes(rest) + chunk[:end] if end else b""
        if end:
            rest.clear()
        rest.extend(chunk[end:])
        if rest and (len(rest) > _LINE_BYTES or not chunk):
            lines += bytes(rest) + (b"\n" if rank else b"")
            rest.clear()
        if rank:
            marked = (before + line + b"\n" for line in lines.split(b"\n")[:-1])
            _pass_on_lines(outlet, stream, b"".join(marked))
        else:
            _pass_on_pieces(outlet, stream, lines)
            outlet.ended = outlet.ended or not chunk

    return write


def pieces(stream: IO[str], outlet: Outlet, log: IO[bytes] | None, master: int = -1) -> Sink:
    """A sink that passes on every byte of rank 0 at once. `master` is the launcher's end of its
    pseudo-terminal, which follows the size of the real one."""

    def write(chunk: bytes) -> None:
        if log is not None:
            _keep(log, chunk)
        if master >= 0 and chunk:
            _set_size(master)
        _pass_on_pieces(outlet, stream, chunk)
        outlet.ended = outlet.ended or not chunk

    return write


def _pass_on_lines(outlet: Outlet, stream: IO[str], lines: bytes) -> None:
    """Pass on whole lines of a rank above 0, now or when rank 0's line has ended."""
    if lines:
        wait_s = 0.0 if outlet.ended else _PATIENCE_S
        outlet.waiting.append((stream, lines))
        outlet.due = min(outlet.due, time.monotonic() + wait_s)
        settle(outlet, time.monotonic())


def _pass_on_pieces(outlet: Outlet, stream: IO[str], data: bytes) -> None:
    """Pass on bytes of rank 0. Lines that wait come after the first line that ends. Raises
    UnreadError."""
    end = data.find(b"\n") + 1 if outlet.waiting else 0
    for part in (data[:end], data[end:]):
        if part:
            _pass_on(outlet, stream, part)
            outlet.unfinished = None if part.endswith(b"\n") else stream
            settle(outlet, time.monotonic())
    if data and stream in outlet.unread:
        raise UnreadError


def _pass_on(outlet: Outlet, stream: IO[str], data: bytes) -> None:
    """Write the bytes unchanged: the rank chose their encoding. Raises OutputError if stdout cannot be
    written."""
    try:
        stream.buffer.write(data)  # type: ignore[attr-defined]
        stream.flush()
    except OSError as error:
        if stream is sys.stdout and error.errno != errno.EPIPE:
            raise OutputError(error.errno, error.strerror) from error
        silence(stream)
        outlet.unread.append(stream)


def _set_size(terminal: int) -> None:
    """Give a pseudo-terminal the size of the real one."""
    with suppress(OSError, termios.error):
        size = termios.tcgetwinsize(sys.stdout.fileno())
        if termios.tcgetwinsize(terminal) != size:
            termios.tcsetwinsize(terminal, size)


def _keep(log: IO[bytes], data: bytes) -> None:
    """Write all of `data` to a log. Raises LaunchError."""
    try:
        while data:
            data = data[log.write(data) :]
    except OSError as error:
        raise LaunchError(f"{log.name} cannot be written ({error.strerror})") from error
