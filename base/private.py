"""Folders from which this process loads code: only this user and root may be able to write there.

A library in a cache has a name that anybody can compute. If another user can write to a folder on its
path, that user chooses what is loaded. So every folder of the path is checked, each through a
descriptor of its parent and never through a link. A folder that fails the check is not used. Not here:
what is stored in such a folder, and how damage to it is detected.
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
    """Another user could put files where this process loads code, or has done so."""


def make_private(path: Path) -> Path:
    """Make the folder `path` and its missing parents for this user alone (mode 0700), and return its
    real path. An existing folder must be private: this user or root owns it and all its parents, and
    nobody else can write to it, nor to a parent that is not sticky. Raises NotPrivateError, and OSError
    if the folder cannot be made."""
    real = Path(os.path.realpath(path))
    for folder in (*reversed(real.parents), real):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    check_private(real)
    return real


def check_private(real: Path) -> None:
    """The check of `make_private`, for an existing folder; `real` is a path without links. Raises
    NotPrivateError."""
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
    """Raise NotPrivateError unless `path` (in a private folder) is a plain file, not a link, that this
    user or root owns and nobody else can write. Raises FileNotFoundError if it does not exist."""
    try:
        # O_NONBLOCK: opening a named pipe must not block.
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
    """Yoke's private folder for compiled code, and a remark. It is `yoke` in the user's cache folder,
    with the remark "". If that cannot be used, it is a folder of this user in the one for temporary
    files, and the remark says why. Raises OSError if neither can be used."""
    return first_private(cache_candidates())


def cache_candidates() -> list[Path | None]:
    """The folders that `cache_folder` tries, in order. Nothing is made; None: this user has no home."""
    home = cache_home()
    preferred = None if home is None else home / "yoke"
    return [preferred, Path(tempfile.gettempdir()) / f"yoke-{os.geteuid()}"]


def first_private(folders: Iterable[Path | None]) -> tuple[Path, str]:
    """The first of these folders that can be made private, and a remark on why an earlier one could not
    ("" for the first). None stands for the folder of a user without a home. Raises the last OSError if
    none can."""
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
    """A descriptor of the folder `name` in the folder of `descriptor`."""
    try:
        return os.open(name, _FOLDER, dir_fd=descriptor)
    except OSError as error:
        raise NotPrivateError(f"{real}: {name} is not a folder ({error.strerror})") from error


def _check(found: os.stat_result, path: Path, sticky_is_fine: bool) -> None:
    # The owner of / controls everything: root, or another uid in a namespace that does not map root.
    if found.st_uid not in (0, os.geteuid(), os.stat("/").st_uid):
        raise NotPrivateError(
            f"{path} belongs to user {found.st_uid}, who could put code there that this user would run"
        )
    if found.st_mode & _OTHERS_WRITE and not (sticky_is_fine and found.st_mode & stat.S_ISVTX):
        raise NotPrivateError(
            f"other users can write to {path}, and so put code there that this user would run (to use "
            f"it: chmod go-w {path}, and remove files that are not yours)"
        )
