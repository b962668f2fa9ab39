"""What Yoke keeps in its cache folder, by kind: its size, when it was last used, and its removal.

Everything in it is made again when it is needed. Only what is known by its name, and by the lock or the
mark in it, is ever removed: a folder that somebody else put there stays. A kind that has a lock is
removed only while nobody holds it, and the lock's file stays, so that a run which waits for the lock
finds an empty folder and no other.

What is not here: who makes the files (`comm.build`, `engine.packages`, `engine.compiling`); the hub's
cache of models, which other programs share.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from base.errors import LaunchError
from base.private import NotPrivateError, cache_candidates, check_private

EXTENSIONS = "extensions"
BUILD_LOCK = "build.lock"
STEPS = "steps"
STEPS_LOCK = "lock"
COMPILED = "inductor-torch-"  # and torch's version
COMPILED_MARK = "yoke-made-this"
COMPILERS = "compilers"


@dataclass(frozen=True)
class Kind:
    """`folders` matches the names of its folders. `lock`: the file whose lock the makers of its files
    hold, "" if there is none; a folder without this file is not ours."""

    name: str
    what: str
    folders: str
    lock: str


KINDS = (
    Kind("extensions", "C++ operators for torch", EXTENSIONS, BUILD_LOCK),
    Kind("steps", "steps of models, compiled ahead of time", STEPS, STEPS_LOCK),
    Kind("compiled", "steps that torch.compile compiled", rf"{COMPILED}[\w.+-]+", COMPILED_MARK),
    Kind(
        "damaged",
        "compiled steps that were put aside",
        rf"{COMPILED}[\w.+-]+\.damaged-[0-9a-f]{{8}}",
        "",
    ),
    Kind("compilers", "scripts for a $CXX of several words", COMPILERS, ""),
)


@dataclass(frozen=True)
class Cache:
    """A folder with files of one kind. `used` is the time of its newest use, in seconds since 1970, as
    far as the file system notes it; on most, to a day."""

    kind: Kind
    path: Path
    size: int
    files: int
    used: float


def cache_roots() -> list[Path]:
    """Yoke's cache folders that exist and are this user's alone."""
    found = []
    for folder in cache_candidates():
        if folder is not None and folder.is_dir():
            real = Path(os.path.realpath(folder))
            with suppress(NotPrivateError):
                check_private(real)
                found.append(real)
    return found


def read_caches(root: Path) -> list[Cache]:
    """What is in a cache folder, in the order of KINDS; folders without files are left out."""
    found = []
    for kind in KINDS:
        for path in sorted(root.iterdir()):
            if _is_of(kind, path):
                cache = _measure(kind, path)
                if cache.files:
                    found.append(cache)
    return found


def _is_of(kind: Kind, path: Path) -> bool:
    if not re.fullmatch(kind.folders, path.name) or path.is_symlink() or not path.is_dir():
        return False
    if kind.name == "compiled" and _is_of(_kind("damaged"), path):
        return False
    return not kind.lock or os.path.lexists(path / kind.lock)


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def _measure(kind: Kind, path: Path) -> Cache:
    size, count, used = 0, 0, 0.0
    for file in _files(path):
        if file == path / kind.lock:
            continue
        with suppress(FileNotFoundError):  # another run has just replaced it
            found = file.lstat()
            size += found.st_blocks * 512
            count += 1
            used = max(used, found.st_mtime, found.st_atime)
    return Cache(kind, path, size, count, used)


def _files(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def clear_caches(caches: list[Cache]) -> int:
    """Remove the files of the caches; returns how many bytes they took. Raises LaunchError, before
    anything is removed, if another process is using one of them."""
    with ExitStack() as stack:
        for cache in caches:
            if cache.kind.lock:
                _lock(cache, stack)
        for cache in caches:
            for entry in cache.path.iterdir():
                if entry.name == cache.kind.lock:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            if not cache.kind.lock:
                cache.path.rmdir()
    return sum(cache.size for cache in caches)


def _lock(cache: Cache, stack: ExitStack) -> None:
    path = cache.path / cache.kind.lock
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LaunchError(
            f"{cache.path} is in use: another process is making files there; try again when it has "
            "started, or stop it"
        ) from None
