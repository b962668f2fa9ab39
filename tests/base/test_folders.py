"""A process may have no home: every folder of the user's is then None, and nothing raises."""

from __future__ import annotations

import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from base import folders


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
