"""Folders whose files this process runs as code: only this user and root may be able to put one there.

A library in a cache is found by a name that anybody can compute. Where another user can write to a
folder on the way, they choose what is loaded. So the whole way is checked, each folder through a
descriptor of the one above it and never through a link, and a folder that does not pass is not used.
Not here: what is kept in such a folder, and how damage to it is found.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from base.folders import cache_home

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotPrivateError(OSError):
    """Another user could put files where this process would take code from, or has done so."""


def make_private(path: Path) -> Path:
    """Make the folder `path`, and those that are missing above it, for this user alone (mode 0700), and
    return where it really lies. One that is there already must be private: its owner and those of all
    folders above it are this user or root, and nobody else can write to it, nor to one above it unless
    that is sticky. Raises NotPrivateError, and OSError where it cannot be made."""
    real = Path(os.path.realpath(path))
    for folder in (*reversed(real.parents), real):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    check_private(real)
    return real


def check_private(real: Path) -> None:
    """`make_private`'s check of a folder that exists, given without links. Raises NotPrivateError."""
    descriptor = os.open("/", _FOLDER)
    try:
        last = len(real.parts) - 1
        for index, name in enumerate(real.parts):
            if index:
                above, descriptor = descriptor, _below(descriptor, name, real)
                os.close(above)
            here = Path(*real.parts[: index + 1])
            _check(os.fstat(descriptor), here, sticky_is_fine=index < last)
    finally:
        os.close(descriptor)


def check_private_file(path: Path) -> None:
    """Raise NotPrivateError unless `path`, in a folder that is private, is a plain file and no link, of
    this user or root, to which nobody else can write. Raises FileNotFoundError if it is not there."""
    try:
        # Not to be held up by a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotPrivateError(f"{path} is not a file of this user's: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise NotPrivateError(f"{path} is not a plain file")
    _check(found, path, sticky_is_fine=False)


def cache_folder() -> tuple[Path, str]:
    """Yoke's own folder for what it has compiled, made and private, and a remark ("" if there is none
    to make): `yoke` in the user's cache folder, else, where that cannot be used, a folder of this user
    in the one for temporary files, which the remark explains. Raises OSError where neither can."""
    home = cache_home()
    wished = None if home is None else home / "yoke"
    fallback = Path(tempfile.gettempdir()) / f"yoke-{os.geteuid()}"
    return first_private([wished, fallback])


def first_private(folders: Iterable[Path | None]) -> tuple[Path, str]:
    """The first of these folders that can be made private, and why not one before it. None stands for
    the folder of a user who has no home. Raises OSError, the last one's, if there is none."""
    reason = ""
    failed: OSError = FileNotFoundError("this user has no folder for caches")
    for folder in folders:
        if folder is None:
            reason = str(failed)
            continue
        try:
            real = make_private(folder)
            if not os.access(real, os.W_OK | os.X_OK):
                raise PermissionError(f"{real} cannot be written to")
        except OSError as error:
            failed = error
            reason = reason or _reason(error, folder)
            continue
        return real, f"{reason}; using {real} in its place" if reason else ""
    raise failed


def _reason(error: OSError, folder: Path) -> str:
    if isinstance(error, NotPrivateError) or error.strerror is None:
        return str(error)
    return f"the cache folder {folder} cannot be made: {error.strerror}"


def _below(descriptor: int, name: str, real: Path) -> int:
    """The folder `name` in that of `descriptor`."""
    try:
        return os.open(name, _FOLDER, dir_fd=descriptor)
    except OSError as error:
        raise NotPrivateError(f"{real}: {name} is not a folder ({error.strerror})") from error


def _check(found: os.stat_result, path: Path, sticky_is_fine: bool) -> None:
    # Whoever owns the root folder owns all: root, but for namespaces that have no name for root.
    if found.st_uid not in (0, os.geteuid(), os.stat("/").st_uid):
        raise NotPrivateError(
            f"{path} belongs to user {found.st_uid}, who could put code there for this one to run"
        )
    if found.st_mode & _OTHERS_WRITE and not (sticky_is_fine and found.st_mode & stat.S_ISVTX):
        raise NotPrivateError(
            f"other users can write to {path}, and so put code there for this one to run (to have it "
            f"used: chmod go-w {path}, and remove what is not yours)"
        )
