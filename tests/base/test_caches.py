"""The command `cache` lists what is kept on disk, and removes only that, while nobody uses it."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from pathlib import Path

import pytest

from base.caches import KINDS, cache_roots, clear_caches, read_caches
from base.errors import LaunchError
from launcher.cache import ago, cache_command
from tests.running import yoke

TORCH = "inductor-torch-2.13.0+cpu"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with something of every kind, and with folders that are not ours."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the cache of a user without a home is there
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = tmp_path / "yoke"
    for name in (
        "extensions/build.lock", "extensions/yoke_comm-0123.so", f"{TORCH}/yoke-made-this",
        f"{TORCH}/ab/code.cpp", f"{TORCH}/ab/code.so", f"{TORCH}.damaged-0a1b2c3d/x/old.so",
        "compilers/abc-g++", "steps/lock", "steps/0a1b/step.so",
        "inductor-torch-9/theirs.so", "notes/important.txt", "file",
    ):  # fmt: skip
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 5000)
    root.chmod(0o700)
    (root / "extensions" / "link").symlink_to(root / "notes")
    return root


def left(root: Path) -> set[str]:
    return {str(file.relative_to(root)) for file in root.rglob("*") if not file.is_dir()}


OTHERS = {"inductor-torch-9/theirs.so", "notes/important.txt", "file"}
LOCKS = {"extensions/build.lock", "steps/lock", f"{TORCH}/yoke-made-this"}


def test_what_there_is_by_kind(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_roots()[0] == root
    found = read_caches(root)
    assert [(cache.kind.name, cache.path.name, cache.files) for cache in found] == [
        ("extensions", "extensions", 1),
        ("steps", "steps", 1),
        ("compiled", TORCH, 2),
        ("damaged", f"{TORCH}.damaged-0a1b2c3d", 1),
        ("compilers", "compilers", 1),
    ]
    assert all(cache.size >= 5000 and time.time() - cache.used < 600 for cache in found)
    assert cache_command([], False, root) == 0
    told = capsys.readouterr().out
    assert f"{root}: " in told and f"{TORCH}: steps that torch.compile compiled\n" in told
    assert "models from the hub, which other programs share" in told
    assert cache_command([], True, None) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {entry["path"] for entry in listed} >= {str(cache.path) for cache in found}


def test_all_of_it_is_cleared_and_nothing_else(root: Path) -> None:
    found = read_caches(root)
    assert clear_caches(found) == sum(cache.size for cache in found)
    assert left(root) == OTHERS | LOCKS
    assert read_caches(root) == []


def test_one_kind_is_cleared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left(root)
    assert cache_command(["clear", "damaged"], False, None) == 0
    assert before - left(root) == {f"{TORCH}.damaged-0a1b2c3d/x/old.so"}
    assert capsys.readouterr().out.startswith("cleared damaged: ")


def test_what_is_in_use_stays(root: Path) -> None:
    """As a run that compiles holds it (`engine.compiling`), or one that builds operators."""
    before = left(root)
    for lock, kind in (
        (f"{TORCH}/yoke-made-this", fcntl.LOCK_SH),
        ("extensions/build.lock", fcntl.LOCK_EX),
    ):
        with (root / lock).open() as held:
            fcntl.flock(held, kind)
            with pytest.raises(LaunchError, match="is in use: another process is making files there"):
                clear_caches(read_caches(root))
            assert left(root) == before


def test_a_folder_that_others_can_write_is_not_touched(root: Path) -> None:
    root.chmod(0o777)
    assert root not in cache_roots()
    root.chmod(0o700)
    (root / "extensions" / "build.lock").unlink()
    assert "extensions" not in [cache.kind.name for cache in read_caches(root)]
    os.rename(root / "compilers", root / "elsewhere")
    (root / "compilers").symlink_to(root / "elsewhere")
    assert "compilers" not in [cache.kind.name for cache in read_caches(root)]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["clera"], "cache clera: must be cache .a list. or cache clear, did you mean 'clear'"),
        (
            ["clear", "extension"],
            "must be one of extensions, steps, compiled, .* did you mean 'extensions'",
        ),
    ],
)
def test_wrong_words(words: list[str], match: str) -> None:
    with pytest.raises(LaunchError, match=match):
        cache_command(words, False, None)


def test_ages() -> None:
    assert [ago(s) for s in (5, 60, 7199, 7200, 86400, 2 * 86400)] == [
        "just now", "1 min ago", "1 h ago", "2 h ago", "24 h ago", "2 days ago",
    ]  # fmt: skip


def test_the_command(root: Path) -> None:
    done = yoke("cache", "clear", "compiled", XDG_CACHE_HOME=str(root.parent), HF_HOME=str(root))
    assert done.returncode == 0 and done.stdout.startswith("cleared compiled: "), done.stderr
    assert not (root / TORCH / "ab").exists()
    assert yoke("cache", "--sysfs", "/").returncode == 2
    assert len(KINDS) == 5
