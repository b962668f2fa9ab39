"""A process may have no home: every folder of the user's is then None, and nothing raises."""

from __future__ import annotations

import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from base import folders
from tests.others import as_root, by_unknown
from tests.running import CHECKOUT


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uid that the password file does not know, and no HOME."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("folder", "variable"),
    [
        (folders.home, "HOME"),
        (folders.cache_home, "XDG_CACHE_HOME"),
        (folders.state_home, "XDG_STATE_HOME"),
        (folders.runtime_home, "XDG_RUNTIME_DIR"),
    ],
)
@pytest.mark.usefixtures("nobody")
def test_without_a_home_there_is_none(
    folder: Callable[[], Path | None], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder() is None
    for value in ("", "here/there"):
        monkeypatch.setenv(variable, value)
        assert folder() is None
    monkeypatch.setenv(variable, "/somewhere")
    assert folder() == Path("/somewhere")


def test_defaults_lie_in_the_home(nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/one")
    assert folders.cache_home() == Path("/home/one/.cache")
    assert folders.state_home() == Path("/home/one/.local/state")


def test_a_tilde_is_the_home_or_stays(nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("~", "~/x", "~no-such-user/x", "x/~"):
        assert folders.expand(text) == Path(text)
    monkeypatch.setenv("HOME", "/home/one")
    assert folders.expand("~/x") == Path("/home/one/x")
    assert folders.expand("~") == Path("/home/one")
    assert folders.expand("/x") == Path("/x")


@as_root
@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["plan"], 0, ""),
        (["model=owner/name", "prompt=x"], 2, "error: model=owner/name: there is no such path"),
        (["model=~/x", "prompt=x"], 2, "error: model=~/x: there is no such file"),
        (["model=tiny", "weights=random", "prompts=~/x"], 2, "error: prompts=~/x"),
        (
            ["quantize", "model=~nobody-at-all/x", "quant=int8", "out=/tmp/none"],
            2,
            "error: model=~nobody-at-all/x",
        ),
    ],
)
def test_commands_of_a_uid_that_nobody_knows(words: list[str], code: int, expected: str) -> None:
    command = by_unknown(sys.executable, str(CHECKOUT / "launch.py"), *words)
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert (done.returncode, done.stderr[: len(expected)]) == (code, expected), done.stderr
    assert "Traceback" not in done.stderr
