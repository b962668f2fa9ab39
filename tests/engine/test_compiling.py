"""Compiled code that was damaged on disk is dropped and compiled again, whatever part it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from engine.compiling import VARIABLE, drop_if_damaged, seal, use_cache_folder


def fill(folder: Path) -> list[Path]:
    files = [
        folder / name for name in ("aa/code.so", "aa/code.cpp", "b.py", "entries/fx/key", "x.lock")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"the text of {file.name}")
    return files


def test_a_folder_that_is_as_it_was_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert not drop_if_damaged(folder)  # not there yet
    files = fill(folder)
    assert not drop_if_damaged(folder)  # never finished: torch itself copes with what it has begun
    seal(folder)
    assert not drop_if_damaged(folder)
    files[-1].write_text("a lock is nobody's code")
    files[-2].write_text("torch writes its entries anew")
    (folder / "new.so").write_text("of a run that is going on")
    assert not drop_if_damaged(folder)
    assert all(file.exists() for file in files)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_any_damage_drops_it_all(index: int, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    file = fill(folder)[index]
    seal(folder)
    if damage == "cut":
        os.truncate(file, 3)
    elif damage == "changed":
        file.write_text(file.read_text()[::-1])
    else:
        file.unlink()
    assert drop_if_damaged(folder)
    assert list(tmp_path.iterdir()) == []
    fill(folder)
    seal(folder)
    assert not drop_if_damaged(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"../../etc/passwd": 5}', '{"aa/code.so": null}'])
def test_a_damaged_seal_drops_it_too(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill(folder)
    (folder / "yoke-seal.json").write_text(text)
    assert drop_if_damaged(folder)
    assert not folder.exists()


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for given in (None, default_cache_dir()):
        monkeypatch.setenv(VARIABLE, given) if given else monkeypatch.delenv(VARIABLE, raising=False)
        folder = use_cache_folder()
        assert folder.parent == tmp_path / "yoke"
        assert os.environ[VARIABLE] == str(folder)
    monkeypatch.setenv(VARIABLE, "/else/where")
    assert use_cache_folder() == Path("/else/where")


@pytest.mark.slow
def test_a_run_survives_a_damaged_cache(tmp_path: Path, run_yoke: Callable) -> None:
    words = ["--ranks=2", "model=tiny", "num_layers=1", "weights=random", "prompt=ab", "output=json"]

    def run() -> tuple[list[int], float, str]:
        done = run_yoke(*words, "max_new_tokens=4", **{VARIABLE: str(tmp_path / "cache")})
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        return report["token_ids"], report["compile_s"], done.stderr

    tokens, first_s, _ = run()
    again, second_s, said = run()
    assert again == tokens
    assert second_s < first_s
    assert "damaged" not in said
    for file in (tmp_path / "cache").rglob("*.so"):
        os.truncate(file, 100)
    mended, _, said = run()
    assert mended == tokens
    assert "damaged" in said
    # What leads to the code has no ending, and torch itself passes over what it cannot read.
    for file in (tmp_path / "cache").rglob("*"):
        if file.is_file() and not file.suffix:
            os.truncate(file, file.stat().st_size // 2)
    assert run()[0] == tokens
