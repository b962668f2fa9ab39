"""A folder that appears whole or not at all, whatever happens to the process that writes it.

It is written as a hidden sibling, `.NAME.partial-TOKEN`, and renamed when all of it is on the disk. A
run that fails or is interrupted removes its sibling; one that was killed leaves it, and the next run
for the same name does. Whether the owner of a sibling still lives is told by a lock that the kernel
drops with the process, not by a pid, which another process may have got since.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from base.errors import InputError

_LOCK = ".lock"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked for the end. Not an Exception: nothing on the way up should take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals that ask for the end raise Interrupted in the main thread, once: what they start, the
    cleaning up, is not interrupted by further ones."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_target(out: Path) -> None:
    """Raise InputError unless `out` is free: absent, or an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} exists and is not a folder; give the name of a new one")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty; give a new folder, or remove it first")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist; create it first")


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError unless the file system of `folder` has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder} has {format_bytes(free)} free and the result needs {format_bytes(needed)}; "
            "free some, or write it elsewhere"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into. It becomes `out` when the block ends well, and is removed when it does
    not. Raises InputError where the file system refuses.

    The folder's name is chosen before the folder exists, so whatever is raised from then on, a signal
    between any two steps included, finds what must be removed.
    """
    out = out.absolute()
    check_target(out)
    remove_leftovers(out)
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(8)}"
    with contextlib.ExitStack() as lock:
        try:
            try:
                _create(partial, lock)
            except OSError as error:
                reason = f"nothing can be written there ({error.strerror})"
                raise InputError(f"{out.parent}: {reason}") from error
            yield partial
            _finish(partial, out)
        except OSError as error:
            left = _remove(partial)
            reason = os.strerror(error.errno) if error.errno else str(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason += "; free some, or write it elsewhere"
            raise InputError(f"{out} could not be written: {reason}; {left}") from error
        except BaseException as error:
            error.add_note(_remove(partial))
            raise


def _finish(partial: Path, out: Path) -> None:
    """Give the folder its name, once all of it is on the disk."""
    _sync(partial)
    (partial / _LOCK).unlink()
    partial.rename(out)  # takes the place of an empty folder, and of nothing else
    _sync(out.parent)


def left_by(stopped: Interrupted, out: Path) -> str:
    """What an interrupted run has left, in a few words. `out` was free when the run began: what is in
    it now has been renamed whole."""
    if out.is_dir() and any(out.iterdir()):
        return f"{out} is complete"
    notes: list[str] = getattr(stopped, "__notes__", [])
    return notes[0] if notes else "nothing was left"


def _remove(folder: Path) -> str:
    """Remove a folder that may not exist, and say whether it is gone. What a thread was doing in it
    when it was stopped may need a moment to end."""
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return "nothing was left"
        time.sleep(0.05)
    return f"{folder} could not be removed"


def remove_leftovers(out: Path) -> list[Path]:
    """Remove what killed runs for the same `out` have left; those of living ones stay."""
    out = out.absolute()
    removed = []
    for folder in sorted(out.parent.glob(f".{_escaped(out.name)}.partial-*")):
        with contextlib.suppress(OSError):  # somebody lives who has it, or removes it just now
            lock = _lock(folder)
            try:
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
            finally:
                os.close(lock)
    return removed


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _create(partial: Path, opened: contextlib.ExitStack) -> None:
    """Make the folder and take its lock, which `opened` closes."""
    while True:
        partial.mkdir()
        # Until it is locked, another run may take it for a leftover and remove it.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = _lock(partial)
            opened.callback(os.close, lock)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(partial / _LOCK).st_ino == os.fstat(lock).st_ino:
                    return


def _lock(folder: Path) -> int:
    """Take the lock of a folder. Raises OSError if somebody lives who has it, and for links: what they
    point to is not ours to write to."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | flags, 0o666, dir_fd=inside)
    finally:
        os.close(inside)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _sync(folder: Path) -> None:
    """The names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_bytes(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
