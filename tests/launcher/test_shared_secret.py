"""The secret of several machines: refused where it is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from base.errors import LaunchError
from launcher.shared_secret import shared_secret

GOOD = "0123456789abcdef"


def test_it_is_read_from_a_private_file_or_the_variable(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{GOOD}\n")
    file.chmod(0o600)
    assert shared_secret(file, {}) == GOOD
    assert shared_secret(None, {"YOKE_SECRET": f" {GOOD}"}) == GOOD
    file.chmod(0o440)  # as a group's of a container
    assert shared_secret(file, {"YOKE_SECRET": "x"}) == GOOD


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666])
def test_a_file_that_others_can_read_is_no_secret(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(GOOD)
    file.chmod(mode)
    with pytest.raises(LaunchError, match=f"open to other users: chmod 600 {file}"):
        shared_secret(file, {})


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"openssl rand -hex 32.*--secret-file"):
        shared_secret(None, {})
    with pytest.raises(LaunchError, match=r"YOKE_SECRET has 5 characters, .* 16"):
        shared_secret(None, {"YOKE_SECRET": "short"})
    with pytest.raises(LaunchError, match="No such file"):
        shared_secret(tmp_path / "nothing", {})
    with pytest.raises(LaunchError, match=r"not a file|Is a directory"):
        shared_secret(tmp_path, {})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_another_users_file_is_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(GOOD)
    file.chmod(0o600)
    os.chown(file, 65534, 65534)
    with pytest.raises(LaunchError, match="belongs to another user"):
        shared_secret(file, {})
