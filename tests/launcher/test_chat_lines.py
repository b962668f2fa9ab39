"""Turns out of lines, the history's file, the table of figures; no process and no terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.chat.lines import AbandonedError, Turn, history_path, load_history, read_turn, remember
from launcher.chat.link import Done
from launcher.chat.view import figures, stats


def turns(lines: list[str]) -> list[Turn]:
    """All turns of these lines."""
    rest, found = iter(lines), []

    def next_line(goes_on: bool) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    while True:
        try:
            found.append(read_turn(next_line))
        except EOFError:
            return found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["a", " b "], [Turn("a", False), Turn("b", False)]),
        (["a\\", "b\\", "c", "d"], [Turn("a\nb\nc", False), Turn("d", False)]),
        (["a\\"], [Turn("a", False)]),
        (['"""', "a", "", "b", '"""', "c"], [Turn("a\n\nb", False), Turn("c", False)]),
        (['  """a', 'b"""  '], [Turn("a\nb", False)]),
        (['"""a"""', '""""""', '"""'], [Turn("a", False), Turn("", False), Turn("", False)]),
        (['"""', "/a"], [Turn("/a", False)]),
        (["/system a\\", "b"], [Turn("/system a\nb", True)]),
        (["/stats ", " /etc"], [Turn("/stats", True), Turn("/etc", False)]),
        (["pasted\ntext", '"""pasted\ntext"""'], [Turn("pasted\ntext", False)] * 2),
        (['a """ b'], [Turn('a """ b', False)]),
    ],
)
def test_lines_make_turns(lines: list[str], found: list[Turn]) -> None:
    assert turns(lines) == found


def test_a_key_in_the_middle_of_a_turn_abandons_more_than_an_empty_line() -> None:
    def next_line(goes_on: bool) -> str:
        if goes_on:
            raise AbandonedError(empty=True)
        return '"""'

    with pytest.raises(AbandonedError) as caught:
        read_turn(next_line)
    assert not caught.value.empty


def test_the_history_survives_bad_lines_and_stays_short(tmp_path: Path) -> None:
    path = tmp_path / "new" / "yoke" / "history"
    assert load_history(path) == []
    remember(Turn("a\nb", False), path)
    remember(Turn("/text", False), path)
    remember(Turn("/stats", True), path)
    with path.open("ab") as file:
        file.write(b'{"x": 1}\n\xff\xfe\n"nul\\u0000"\n"cut')
    assert load_history(path) == ["a\nb", " /text", "/stats"]
    path.write_text("".join(json.dumps(f"turn {i}") + "\n" for i in range(2500)))
    assert load_history(path) == [f"turn {i}" for i in range(1500, 2500)]
    assert len(path.read_text().splitlines()) == 1000
    assert [file.name for file in path.parent.iterdir()] == ["history"]
    path.unlink()
    path.mkdir()
    assert load_history(path) == []
    remember(Turn("a", False), path)  # not this chat's trouble


def test_where_the_history_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert history_path() == Path("/x/yoke/history")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_path() == Path("/home/me/.local/state/yoke/history")


def test_figures_of_answers() -> None:
    first = Done("stop", 10, 0, 5, 0.1, 0.01, "x")
    last = Done("length", 20, 15, 11, 0.3, 0.02, "y")
    assert figures(first) == "[5 tokens | TTFT 100 ms | 100.0 tokens/s]"
    assert figures(last).startswith(
        "[cut at max_new_tokens or max_seq_len | 11 tokens | 15 of 20 prompt"
    )
    assert figures(Done("cancelled", 1, 0, 1, 0.1, 0.0, "")) == (
        "[stopped | 1 tokens | TTFT 100 ms | no rate]"
    )
    assert stats([first, last], last, 2, 64).splitlines() == [
        "  turns         2 in this conversation, 2 in all",
        "  conversation  31 of 64 tokens",
        "  TTFT          300 ms last, 200 ms mean",
        # 14 steps took 4 * 0.01 + 10 * 0.02 s
        "  rate          50.0 tokens/s last, 58.3 tokens/s mean",
        "  cached        15 of 20 prompt tokens last, 15 of 30 in all",
    ]
    assert stats([], None, 0, 64).splitlines()[1] == "  conversation  0 of 64 tokens"
    assert "  conversation  0 of 64 tokens" in stats([first], None, 0, 64)  # after /reset
