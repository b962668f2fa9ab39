"""A secret that the processes of one user share on a machine, so that others cannot guess socket names.

Ranks that a manager started have no channel to each other before they meet, and every user can read
what the manager gives them (a job number). So the name of the socket at which they meet is a hash of
that and of this secret: no other user can bind it first. The secret is made once, at the first use.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from base.folders import state_home

_BYTES = 32


def user_secret() -> bytes:
    """The secret (32 bytes); empty if the user has no folder for it."""
    home = state_home()
    with suppress(OSError):
        return b"" if home is None else read_secret(home / "yoke" / "secret")
    return b""


def read_secret(path: Path) -> bytes:
    """The file's bytes; a missing file is made. Empty if other users may know them. Raises OSError."""
    if not os.path.lexists(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(path)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return b""
        return file.read(_BYTES)


def _make(path: Path) -> None:
    """Make the file atomically: ranks that start at the same time all read the same secret."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(new, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_bytes(_BYTES))
    try:
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink()
