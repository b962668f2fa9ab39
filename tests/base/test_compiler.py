"""`$CXX` is read by one rule, in Python and in requirements/system.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from base.compiler import find_compiler, program_of
from launcher.doctor.probe import try_compiler

SYSTEM = Path(__file__).resolve().parents[2] / "requirements/system.sh"


def tools(folder: Path) -> str:
    """A PATH with programs that pass on what they are given, and one with a space in its path."""
    (folder / "a b").mkdir()
    for name in ("through", "a b/c++"):
        program = folder / name
        program.write_text('#!/bin/sh\n[ "$1" = g++ ] && shift\nexec g++ "$@"\n')
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("named", "words", "program"),
    [
        ("g++", ["g++"], "g++"),
        ("through g++", ["through", "g++"], "g++"),
        ("through g++ -O1 -DX='a b'", ["through", "g++", "-O1", "-DX=a b"], "g++"),
        ("{}/a b/c++", ["{}/a b/c++"], "{}/a b/c++"),
    ],
)
def test_the_variable_may_hold_several_words(
    named: str, words: list[str], program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", named.format(tmp_path))
    monkeypatch.setenv("PATH", tools(tmp_path))
    found = find_compiler()
    assert found == [word.format(tmp_path) for word in words]
    assert program_of(found) == program.format(tmp_path)
    assert try_compiler().works
    checked = subprocess.run(["sh", str(SYSTEM), sys.executable], capture_output=True, text=True)
    assert "C++ compiler" not in checked.stderr


def test_a_compiler_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "nothing-by-that-name g++")
    assert not try_compiler().works
    checked = subprocess.run(["sh", str(SYSTEM), sys.executable], capture_output=True, text=True)
    assert checked.returncode == 2
    assert "C++ compiler (nothing-by-that-name g++)" in checked.stderr


def test_without_the_variable_it_is_what_the_path_has(tmp_path: Path) -> None:
    assert find_compiler({"PATH": str(tmp_path)}) is None
    assert find_compiler({"PATH": str(tmp_path), "CXX": " "}) is None
    program = tmp_path / "c++"
    program.write_text("")
    program.chmod(0o755)
    assert find_compiler({"PATH": str(tmp_path)}) == [str(program)]


def test_an_open_quote_is_a_message() -> None:
    with pytest.raises(ValueError, match="quotation"):
        find_compiler({"CXX": "g++ -DX='", "PATH": "/bin"})
    assert "not a command" in (try_compiler({"CXX": "g++ -DX='", "PATH": "/bin"}).error or "")
