"""Code is taken only from where nobody else can put it; tried as another user where root runs this."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from base.private import (
    NotPrivateError,
    cache_folder,
    check_private_file,
    first_private,
    make_private,
)

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_missing_is_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_private(tmp_path / "a/b/c")
    finally:
        os.umask(before)
    assert made == tmp_path / "a/b/c"
    assert [mode_of(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3
    assert make_private(made) == made


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
@pytest.mark.parametrize("which", ["a", "a/b", "a/b/c"])
def test_a_folder_that_others_can_write_to_is_refused(which: str, mode: int, tmp_path: Path) -> None:
    folder = make_private(tmp_path / "a/b/c")
    (tmp_path / which).chmod(mode)
    with pytest.raises(NotPrivateError, match=f"other users can write to {tmp_path / which}, .*chmod"):
        make_private(folder)


def test_sticky_folders_may_lie_above_but_not_hold_code(tmp_path: Path) -> None:
    folder = make_private(tmp_path / "a/b")
    (tmp_path / "a").chmod(0o1777)
    assert make_private(folder) == folder
    folder.chmod(0o1777)
    with pytest.raises(NotPrivateError, match=f"other users can write to {folder}"):
        make_private(folder)


def test_a_link_is_followed_to_where_it_leads_and_that_is_checked(tmp_path: Path) -> None:
    real = make_private(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    assert make_private(link / "x") == real / "x"
    real.chmod(0o777)
    with pytest.raises(NotPrivateError, match=f"other users can write to {real}"):
        make_private(link / "x")


@as_root
@pytest.mark.parametrize("which", ["a", "a/b", "a/b/c"])
def test_a_folder_of_another_user_is_refused(which: str, tmp_path: Path) -> None:
    folder = make_private(tmp_path / "a/b/c")
    os.chown(tmp_path / which, NOBODY, NOBODY)
    with pytest.raises(NotPrivateError, match=f"{tmp_path / which} belongs to user {NOBODY}"):
        make_private(folder)


def test_a_file_must_be_a_plain_one_that_nobody_else_can_write_to(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    with pytest.raises(FileNotFoundError):
        check_private_file(file)
    file.write_text("code")
    file.chmod(0o644)
    check_private_file(file)
    file.chmod(0o664)
    with pytest.raises(NotPrivateError, match=f"other users can write to {file}"):
        check_private_file(file)
    file.chmod(0o600)
    link.symlink_to(file)
    os.mkfifo(pipe)
    for other in (link, pipe, tmp_path):
        with pytest.raises(NotPrivateError, match=f"{other} is not a (plain )?file"):
            check_private_file(other)


@as_root
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("code")
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(NotPrivateError, match=f"belongs to user {NOBODY}"):
        check_private_file(file)


def test_the_first_folder_that_can_be_used_is_and_why_is_said(tmp_path: Path) -> None:
    open_to_all, good = tmp_path / "open", tmp_path / "good"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert first_private([good, open_to_all]) == (good, "")
    used, remark = first_private([open_to_all / "yoke", good])
    assert used == good
    assert f"write to {open_to_all}" in remark
    assert "\n" not in remark
    used, remark = first_private([None, good])
    assert used == good
    assert "no folder for caches" in remark
    (tmp_path / "file").write_text("")
    used, remark = first_private([tmp_path / "file/x", good])
    assert used == good
    assert remark
    with pytest.raises(NotPrivateError):
        first_private([open_to_all, None, open_to_all / "x"])


def test_a_user_without_a_home_has_a_cache_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == (tmp_path / "cache/yoke", "")
    monkeypatch.setattr("base.private.cache_home", lambda: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder()[0] == tmp_path / f"yoke-{os.geteuid()}"


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_another_user_cannot_enter_what_was_made() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        made = make_private(Path(folder) / "cache/yoke")
        command = ["setpriv", "--reuid", str(NOBODY), "--clear-groups", "touch"]
        for place in (Path(folder), made):
            done = subprocess.run([*command, str(place / "planted.so")], capture_output=True)
            assert done.returncode != 0
            assert b"Permission denied" in done.stderr
        assert list(made.iterdir()) == []
