"""The secret that ranks on several machines share, so that they believe each other and nobody else.

Ranks of one machine meet where no other user can be; those of several meet through a port of a network.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from base.errors import LaunchError

VARIABLE = "YOKE_SECRET"
_LEAST = 16  # characters


def shared_secret(file: Path | None, environ: Mapping[str, str]) -> str:
    """What `--secret-file` holds, or the variable. Raises LaunchError if there is neither, if it is too
    short to be secret, or if the file is one that other users can read or write."""
    if file is not None:
        return _checked(_read(file), f"--secret-file {file}")
    if VARIABLE in environ:
        return _checked(environ[VARIABLE].strip(), VARIABLE)
    raise LaunchError(
        "ranks on several machines need a secret that they share: on one machine `(umask 077; openssl "
        "rand -hex 32 > secret)`, copy that file to the others, and give all of them --secret-file "
        f"secret (or its text as {VARIABLE})"
    )


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise LaunchError(f"--secret-file {file} is not a file")
            if found.st_uid not in (0, os.geteuid()):
                raise LaunchError(f"--secret-file {file} belongs to another user ({found.st_uid})")
            if found.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise LaunchError(f"--secret-file {file} is open to other users: chmod 600 {file}")
            return opened.read(4096).decode("utf-8", "replace").strip()
    except OSError as error:
        raise LaunchError(f"--secret-file {file}: {error.strerror}") from error


def _checked(secret: str, where: str) -> str:
    if len(secret) < _LEAST:
        raise LaunchError(
            f"{where} has {len(secret)} characters, and a secret needs {_LEAST} at least: "
            "openssl rand -hex 32"
        )
    return secret
