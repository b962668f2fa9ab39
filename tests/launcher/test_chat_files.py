"""Conversations that are saved and loaded, and settings: pure parts, and the commands over a pipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from base.errors import InputError
from launcher.chat.files import load_messages, save_messages
from launcher.chat.link import Done
from launcher.chat.view import settings, stats
from tests.launcher.chats import piped

TALK = [
    {"role": "system", "content": "Be brief. 🙂"},
    {"role": "user", "content": "a\nb\x1b"},
    {"role": "assistant", "content": "half a pair: \ud83d"},
]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    for messages in (TALK, TALK[1:], [], TALK[:1]):
        save_messages(path, messages)  # an earlier conversation is replaced
        assert load_messages(path) == messages
        assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]
    link = tmp_path / "link.json"
    link.symlink_to(path)
    save_messages(link, TALK)
    assert link.is_symlink() and load_messages(path) == TALK
    assert json.loads(path.read_text(errors="surrogatepass"))[0] == TALK[0]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "not a conversation, a JSON list of messages"),
        ("[" * 100_000, "not a conversation"),
        ({"a": 1}, "it holds a dict"),
        (["hi"], "message 1 must be an object with 'role' and 'content'"),
        ([{"role": "user", "content": 3}], "message 1: role and content must be texts"),
        ([{"role": "user", "content": "a"}], "the last message has no answer"),
        ([TALK[2]], "message 1 is of 'assistant', not of 'user'"),
        ([*TALK, TALK[0], TALK[2]], "message 4 is of 'system', not of 'user'"),
        ([*TALK, {**TALK[1], "name": "x"}], "message 4 must be an object"),
    ],
)
def test_a_file_without_a_conversation_is_refused_and_not_replaced(
    content: Any, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    before = path.read_bytes()
    with pytest.raises(InputError, match=match):
        load_messages(path)
    with pytest.raises(InputError, match=r"not saved: .*choose a name that is free"):
        save_messages(path, TALK)
    assert path.read_bytes() == before


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, match in (
        ("pipe", "is not a file"), (".", "cannot be read|not a file"),
        ("no", "cannot be read: No such file"), ("a\0b", "cannot be read: embedded null"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            load_messages(tmp_path / name)
    for name in ("no/talk.json", "x" * 300):
        with pytest.raises(InputError, match=r"cannot be written: (No such file|File name too long)"):
            save_messages(tmp_path / name, TALK)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_settings_are_shown_as_they_are_typed() -> None:
    values = {"temperature": 0.7, "seed": 3, "stop": "a b", "logit_bias": ""}
    assert settings(values, ["seed", "stop"]) == "  seed=3 stop='a b'"
    assert settings(values, []) == "  temperature=0.7 seed=3 stop='a b' logit_bias=''"


def test_a_loaded_conversation_is_not_counted_before_its_next_answer() -> None:
    done = Done("stop", 10, 0, 5, 0.1, 0.1, "x")
    assert "  conversation  not counted yet, of 99 tokens\n" in stats([done], None, 2, 99)
    assert "  conversation  15 of 99 tokens\n" in stats([done], done, 2, 99)
    assert stats([], None, 0, 99).endswith("  conversation  0 of 99 tokens")


def test_commands_over_a_pipe(tmp_path: Path) -> None:
    talk, other = tmp_path / "talk one.json", tmp_path / "other"
    other.write_text("mine")
    lines = [
        "/system be brief", "hello there", f"/save {talk}", "/reset", "count", f"/load {talk}", "count",
        "first", "/set temperature=0.5 'stop=a b'", "/set", "/set bad=1", "/set 'x", f"/save {other}",
        "/load", "/load no",
    ]  # fmt: skip
    done = piped(tmp_path, "\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    saved = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hello there"},
    ]
    assert load_messages(talk) == saved
    assert done.stdout.splitlines() == [
        "hello there", f"1 turn saved in {talk}", "2", f"1 turn loaded from {talk}", "4",
        "system be brief",
        "  temperature=0.5 stop='a b'", "  temperature=0.5 stop='a b' words='[]'",
    ]  # fmt: skip
    told = done.stderr.removeprefix("loading ...").strip().splitlines()
    assert told[0] == "error: no � such key"
    assert told[1] == "error: /set 'x: No closing quotation"
    assert told[2].startswith("error: not saved: ") and other.read_text() == "mine"
    assert told[3] == "/load needs a file: /load FILE"
    assert told[4] == "error: no cannot be read: No such file or directory"
