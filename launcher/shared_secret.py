"""The secret with which ranks on several machines authenticate each other.

Ranks of one machine meet at a socket that no other user can bind. Ranks on several machines meet at a
network port, where anybody can connect.
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
    """The secret from `--secret-file`, or from YOKE_SECRET. Raises LaunchError if neither is given, if
    it is too short, or if other users can read or write the file."""
    if file is not None:
        return _checked(_read(file), f"--secret-file {file}")
    if VARIABLE in environ:
        return _checked(environ[VARIABLE].strip(), VARIABLE)
    raise LaunchError(
        "ranks on several machines need a shared secret: on one machine run `(umask 077; openssl "
        "rand -hex 32 > secret)`, copy that file to the others, and give all of them --secret-file "
        f"secret (or set {VARIABLE} to its text)"
    )


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise LaunchError(f"--secret-file {file} is not a regular file")
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
            f"{where} has {len(secret)} characters, and a secret needs at least {_LEAST}: "
            "openssl rand -hex 32"
        )
    return secret
