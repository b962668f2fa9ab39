"""What ranks print: rank 0's goes straight to the terminal, the others' with their rank before it.

With a log folder every rank's output is also written to `rank-N.log`; rank 0 then writes through a
pseudo-terminal where the launcher has a terminal, so that its progress bars stay.
"""

from __future__ import annotations

import os
import pty
import sys
import termios
import tty
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from launcher.errors import LaunchError

Sink = Callable[[bytes], None]


def open_log(folder: Path, rank: int) -> IO[bytes]:
    """`folder/rank-N.log`, new. Raises LaunchError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / f"rank-{rank}.log").open("wb", buffering=0)
    except OSError as error:
        raise LaunchError(f"--log-dir {folder} cannot be written ({error.strerror})") from error


def open_channel(terminal: bool) -> tuple[int, int]:
    """A (read, write) pair of descriptors for a rank's output: a pipe, or a pseudo-terminal."""
    if not terminal:
        return os.pipe()
    master, slave = pty.openpty()
    tty.setraw(slave)  # the real terminal does the translation, once
    with suppress(termios.error):
        termios.tcsetwinsize(slave, termios.tcgetwinsize(sys.stdout.fileno()))
    return master, slave


def whole_lines(rank: int, stream: IO[str], log: IO[bytes] | None) -> Sink:
    """Pass on whole lines with the rank's name; an unfinished one at the end of its output (an empty
    chunk)."""
    rest = b""

    def write(chunk: bytes) -> None:
        nonlocal rest
        if log is not None:
            log.write(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            lines.append(rest)
        if lines:
            text = "".join(f"[rank {rank}] {line.decode(errors='replace')}\n" for line in lines)
            with suppress(BrokenPipeError):  # nobody reads; rank 0 will notice and end the run
                stream.write(text)
                stream.flush()

    return write


def untouched(stream: IO[str], log: IO[bytes]) -> Sink:
    """Pass on every byte as it comes, and keep a copy."""

    def write(chunk: bytes) -> None:
        log.write(chunk)
        with suppress(BrokenPipeError):
            stream.buffer.write(chunk)  # type: ignore[attr-defined]
            stream.flush()

    return write
