"""A folder or a file that appears whole or not at all, whatever happens to the process that writes it.

It is written as a hidden folder beside the target, `.NAME.partial-TOKEN`, and renamed when all of it is
on the disk. A file is written in such a folder, and moved out of it. A run that fails or is interrupted
removes its partial folder. A killed run leaves it, and the next run for the same name removes it. A
lock, which the kernel releases when the process ends, shows whether the owner of a partial folder is
still alive; a pid would not, since pids are reused.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from base.errors import InputError
from base.units import format_bytes

_LOCK = ".lock"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the process to stop. Not an Exception, so that `except Exception` does not catch
    it. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """In this context, SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread, once: further
    signals do not interrupt the cleanup that follows."""

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
    """Raise InputError unless `out` can be written: it is absent or an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} exists and is not a folder; give the name of a new one")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty; give a new folder, or remove it first")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist; create it first")


def check_new_file(out: Path) -> None:
    """Raise InputError unless the file `out` can be created: nothing has its name."""
    if out.is_symlink() or out.exists():
        raise InputError(f"{out} exists; give the name of a new file, or remove it first")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist; create it first")


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError unless the file system of `folder` has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder} has {format_bytes(free)} free and the result needs {format_bytes(needed)}; "
            "free some space, or write it elsewhere"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into. It becomes `out` when the block ends without an exception, and is removed
    otherwise. Raises InputError if the file system reports an error.

    The folder's name is chosen before the folder is created, so any exception after that, even a signal
    between two steps, can remove the folder by its name.
    """
    check_target(out.absolute())
    with _partial(out.absolute(), _finish) as partial:
        yield partial


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """The name of a file to create. It becomes `out` when the block ends without an exception, and is
    removed otherwise. Its own name ends like that of `out`. Raises InputError as `new_folder` does, and
    if a file of the name `out` has appeared meanwhile."""
    check_new_file(out.absolute())
    with _partial(out.absolute(), _finish_file) as partial:
        yield partial / out.name


@contextmanager
def _partial(out: Path, finish: Callable[[Path, Path], None]) -> Iterator[Path]:
    """A partial folder for `out`. `finish(partial, out)` moves its content there when the block ends
    without an exception."""
    remove_leftovers(out)
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(8)}"
    with contextlib.ExitStack() as lock:
        try:
            try:
                _create(partial, lock)
            except OSError as error:
                reason = f"nothing can be written there ({error.strerror})"
                raise InputError(f"{out.parent}: {reason}; write it elsewhere") from error
            yield partial
            finish(partial, out)
        except OSError as error:
            left = _remove(partial)
            reason = os.strerror(error.errno) if error.errno else str(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason += "; free some space, or write it elsewhere"
            raise InputError(f"{out} could not be written: {reason}; {left}") from error
        except BaseException as error:
            error.add_note(_remove(partial))
            raise


def _finish(partial: Path, out: Path) -> None:
    """Rename the folder to `out`, once all of it is on the disk."""
    _sync(partial)
    (partial / _LOCK).unlink()
    partial.rename(out)  # can replace an empty folder, but nothing else
    _sync(out.parent)


def _finish_file(partial: Path, out: Path) -> None:
    """Move the file to `out`, once it is on the disk, and remove its folder."""
    _sync(partial)
    written = partial / out.name
    try:
        os.link(written, out)  # unlike a rename it never replaces a file
    except FileExistsError as error:
        raise InputError(
            f"{out} has appeared meanwhile; remove one of the two, or rename it"
        ) from error
    except OSError:  # a file system without hard links
        check_new_file(out)
        written.rename(out)
    _sync(out.parent)
    _remove(partial)


def left_by(stopped: Interrupted, out: Path) -> str:
    """What an interrupted run has left, in a few words. `out` was absent or empty when the run began,
    so any content in it is the complete result."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        return f"{out} is complete"
    notes: list[str] = getattr(stopped, "__notes__", [])
    return notes[0] if notes else "nothing was left"


def _remove(folder: Path) -> str:
    """Remove a folder that may not exist, and say whether it is gone. It retries for 2 s, since threads
    may still be writing into the folder."""
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return "nothing was left"
        time.sleep(0.05)
    return f"{folder} could not be removed"


def remove_leftovers(out: Path) -> list[Path]:
    """Remove the partial folders that killed runs for the same `out` have left, and return them. The
    folders of running processes stay."""
    out = out.absolute()
    removed = []
    for folder in sorted(out.parent.glob(f".{_escaped(out.name)}.partial-*")):
        with contextlib.suppress(OSError):  # a running process owns it, or is removing it now
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
    """Create the folder and take its lock, which `opened` closes."""
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
    """Take the lock of a folder; returns its descriptor. Raises OSError if a running process holds it,
    and for links, whose targets must not be written to."""
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
    """Flush the directory entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
