"""A secret that the processes of one user share on a machine, so that others cannot guess their names.

Ranks that a manager started have no channel to each other before they meet, and what the manager tells
them (a job number) everybody may read. The name of the socket at which they meet is made of that and of
this secret: nobody else can take it first. Made once, at the first use.
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
    """The secret; empty where the user has no folder to keep it in."""
    home = state_home()
    with suppress(OSError):
        return b"" if home is None else read_secret(home / "yoke" / "secret")
    return b""


def read_secret(path: Path) -> bytes:
    """The file's bytes, made if there is none; empty if others may know them. Raises OSError."""
    if not os.path.lexists(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(path)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return b""
        return file.read(_BYTES)


def _make(path: Path) -> None:
    """Whole at once: ranks that come at the same time all read the first one's."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(new, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_bytes(_BYTES))
    try:
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink()
