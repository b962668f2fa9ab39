"""Compiled code that was damaged on disk is dropped and compiled again, whatever part it was; and
nothing else is ever dropped."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor import config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from engine import compiling
from engine.compiling import VARIABLE, CodeFolder, use_cache_folder
from tests.running import RunYoke

SEAL, MARK = "yoke-seal.json", "yoke-made-this"
NAMES = ("aa/code.so", "aa/code.cpp", "b/c/d.py", "entries/fx/key", "x.lock")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CodeFolder:
    """An empty one that Yoke made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    made = use_cache_folder()
    monkeypatch.setenv(VARIABLE, os.environ[VARIABLE])  # so that it goes again
    return made


def fill(folder: Path) -> list[Path]:
    files = [folder / name for name in NAMES]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"the text of {file.name}")
    return files


def compile_into(folder: CodeFolder) -> list[str]:
    """What a rank says around compiling, in which it finds or writes all files."""
    said: list[str] = []
    with compiling.compiling(folder, said.append):
        fill(folder.path)
    return said


def test_a_folder_that_is_as_it_was_is_kept(folder: CodeFolder) -> None:
    assert folder.own
    files = fill(folder.path)
    said: list[str] = []
    with compiling.compiling(folder, said.append):  # never finished: torch copes with what it has begun
        assert all(file.exists() for file in files)
    assert (folder.path / SEAL).exists()
    files[-1].write_text("a lock is nobody's code")
    files[-2].write_text("torch writes its entries anew")
    (folder.path / "new.so").write_text("of a run that is going on")
    with compiling.compiling(folder, said.append):
        assert files[-1].read_text() == "a lock is nobody's code"
        assert (folder.path / "new.so").exists()
    assert said == []


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_any_damage_drops_what_was_compiled_and_nothing_else(
    index: int, damage: str, folder: CodeFolder
) -> None:
    assert compile_into(folder) == []
    others = [folder.path / name for name in ("mine.txt", "aa/mine.so", "b/c/mine")]
    for other in others:
        other.write_text("of the user's")
    file = folder.path / NAMES[index]
    if damage == "cut":
        os.truncate(file, 3)
    elif damage == "changed":
        file.write_text(file.read_text()[::-1])
    else:
        file.unlink()
    said: list[str] = []
    with compiling.compiling(folder, said.append):
        left = {path for path in folder.path.rglob("*") if path.is_file()}
        assert left == {*others, folder.path / MARK}
        assert not (folder.path / "entries").exists()
    assert [line for line in said if "dropped" in line] == said != []
    assert compile_into(folder) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", '{"../mine": null}', '{"/etc/passwd": 5}', '{"aa/code.so": "x"}', '{"": null}'],
)
def test_with_a_damaged_seal_nothing_is_removed_and_nothing_used(
    text: str, folder: CodeFolder, tmp_path: Path
) -> None:
    mine = folder.path.parent / "mine"
    mine.write_text("the user's")
    files = fill(folder.path)
    (folder.path / SEAL).write_text(text)
    said: list[str] = []
    with compiling.compiling(folder, said.append):
        assert [path.name for path in folder.path.iterdir()] == [MARK]
    aside = Path(said[0].split()[-1])
    assert all((aside / file.relative_to(folder.path)).exists() for file in files)
    assert mine.exists()


def test_a_link_out_of_the_folder_is_not_followed(folder: CodeFolder, tmp_path: Path) -> None:
    compile_into(folder)
    outside = tmp_path / "outside"
    (folder.path / "aa").rename(outside)
    (folder.path / "aa").symlink_to(outside)
    os.truncate(folder.path / "b/c/d.py", 1)
    compile_into(folder)
    assert sorted(file.name for file in outside.iterdir()) == ["code.cpp", "code.so"]


def test_while_another_run_compiles_nothing_is_dropped_or_sealed(
    folder: CodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_WAIT_S", 0.2)
    compile_into(folder)
    sealed = (folder.path / SEAL).read_text()
    with (folder.path / MARK).open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with compiling.compiling(folder, lambda line: None):
            (folder.path / "half.so").write_text("half of it")
        assert (folder.path / SEAL).read_text() == sealed
        file = folder.path / NAMES[0]
        os.truncate(file, 1)
        said: list[str] = []
        with compiling.compiling(folder, said.append):
            assert file.exists()
        assert "another run is using it" in said[0]
    assert "dropped" in compile_into(folder)[0]


def test_a_folder_of_the_users_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for given in (None, default_cache_dir()):
        monkeypatch.setenv(VARIABLE, given) if given else monkeypatch.delenv(VARIABLE, raising=False)
        folder = use_cache_folder()
        assert folder.path.parent == tmp_path / "yoke"
        assert folder.own
        assert os.environ[VARIABLE] == str(folder.path)
        assert folder.path.stat().st_mode & 0o777 == 0o700
    own = tmp_path / "own"
    monkeypatch.setenv(VARIABLE, str(own))
    assert use_cache_folder() == CodeFolder(own, own=False)
    files = fill(own)
    (own / SEAL).write_text("{")  # as an earlier Yoke left it, and damaged
    assert compile_into(CodeFolder(own, own=False)) == []
    assert (own / SEAL).read_text() == "{"
    assert all(file.exists() for file in files)
    own.chmod(0o777)
    folder = use_cache_folder()
    assert folder.own
    assert f"other users can write to {own}" in folder.remark


def test_torch_calls_a_compiler_of_several_words(
    folder: CodeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    through = tmp_path / "through it"
    through.write_text('#!/bin/sh\nexec "$@"\n')
    through.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{through}' g++ -DX='a b'")
    with config.patch("cpp.cxx", config.cpp.cxx):  # setattr's undoing would delete the entry
        use_cache_folder()
        program = get_cpp_compiler()
    assert program.endswith("g++")
    done = subprocess.run(
        [program, "-E", "-P", "-x", "c++", "-"], input="X", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "a b"


def cache_with_extensions(folder: Path) -> Path:
    """Make a cache folder in `folder` that holds only the built operators; returns it."""
    cache = folder / "yoke"
    cache.mkdir(mode=0o700)
    built = subprocess.run(
        [sys.executable, "-m", "kernels.load"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    (cache / "extensions").symlink_to(Path(built[0]).parent)
    return cache


@pytest.mark.slow
def test_a_run_survives_a_damaged_cache(tmp_path: Path, run_yoke: RunYoke) -> None:
    words = ["--ranks=1", "model=tiny", "num_layers=1", "weights=random", "prompt=ab", "output=json"]
    cache = cache_with_extensions(tmp_path)

    def run() -> tuple[list[int], float, str]:
        done = run_yoke(*words, "max_new_tokens=4", "compile=true", XDG_CACHE_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        return report["token_ids"], report["compile_s"], done.stderr

    tokens, first_s, said = run()
    assert "compiling: decode_greedy (1 of 2) ..." in said and "extend (2 of 2) ..." in said
    again, second_s, said = run()
    assert again == tokens
    assert second_s < first_s / 4
    assert "compiling: decode_greedy (" not in said
    packages = sorted((cache / "steps").glob("*/step.so"))
    assert len(packages) == 2
    os.truncate(packages[0], 100)
    mended, _, said = run()
    assert mended == tokens
    assert said.count(" (1 of 1, ") == 1 and "s last time) ..." in said
