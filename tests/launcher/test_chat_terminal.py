"""`chat` through real pseudo-terminals, with real ranks that only repeat what they hear."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pexpect
import psutil
import pytest

from tests.launcher.chats import (
    MORE,
    PROMPT,
    SENT,
    at_terminal,
    console_of,
    end_of,
    expect_gone,
    expect_sane,
    pids,
    ready,
    say,
)


def test_a_conversation_with_history_and_commands(tmp_path: Path) -> None:
    with at_terminal(tmp_path, loading_s=0.2) as terminal:
        ready(terminal)
        say(terminal, "one two", "one two\r\n[2 tokens | TTFT 250 ms | 2.0 tokens/s]")
        say(terminal, "\x1b[A three", "one two three\r\n[3 tokens | 4 of 7 prompt tokens cached")
        say(terminal, "count", "5\r\n")
        say(terminal, "escape", "\ufffd[31mred\r\n")
        say(terminal, "error", "error: the conversation is too long (this turn does not count)")
        say(terminal, "/stats", "  turns         4 in this conversation, 4 in all\r\n")
        assert "cached" in terminal.before
        say(terminal, "/reset", "a new conversation\r\n")
        say(terminal, "count", "1\r\n")
        say(terminal, "/system", "(no system message)")
        say(terminal, "/system be kind", "a new conversation, with the system message")
        say(terminal, "/reset", "a new conversation, with the system message")
        say(terminal, "first", "system be kind\r\n")
        say(terminal, "/system", "be kind\r\n")
        say(terminal, '/system ""', "a new conversation\r\n")
        say(terminal, "first", "user first\r\n")
        say(terminal, "/what", "no command /what; there are: /help  /reset")
        say(terminal, "/help", "  /help               this list")
        terminal.send('"""\r')
        terminal.expect_exact(MORE)
        terminal.send("/x\r")
        terminal.expect_exact(MORE)
        say(terminal, 'y"""', "/x\r\ny\r\n[")
        say(terminal, "\x1b[200~p\nq\x1b[201~", "p\r\nq\r\n[")  # pasted: one turn
        terminal.send("\x04")
        assert end_of(terminal)[0] == 0
    assert (tmp_path / "state" / "yoke" / "history").stat().st_mode & 0o777 == 0o600
    with at_terminal(tmp_path) as terminal:  # what was said in the first
        ready(terminal)
        say(terminal, "\x1b[A\x1b[A", "/x\r\ny\r\n[")
        terminal.send("/quit\r")
        assert end_of(terminal)[0] == 0
    expect_gone(pids(tmp_path))


def test_ctrl_c_stops_the_answer_and_twice_at_an_empty_prompt_the_chat(tmp_path: Path) -> None:
    with at_terminal(tmp_path, 'eval "$CHAT"; echo "code $?"; stty -a', pause_s=0.05) as terminal:
        ready(terminal)
        terminal.send("word " * 200 + "\r")
        terminal.expect_exact(SENT + "word word")
        terminal.send("\x03")
        terminal.expect(r"\[stopped \| (\d+) tokens")
        assert int(terminal.match[1]) < 200
        terminal.expect_exact(PROMPT)
        say(terminal, "count", "3\r\n")  # the stopped answer is part of the conversation
        terminal.send("never sent")
        terminal.expect_exact("never sent")
        terminal.send("\x03")
        terminal.expect_exact(PROMPT)
        assert "again" not in terminal.before
        terminal.send('"""\r')
        terminal.expect_exact(MORE)
        terminal.send("\x03")
        terminal.expect_exact(PROMPT)
        terminal.send("\x03")
        terminal.expect_exact("Ctrl-C again, Ctrl-D or /quit ends the chat")
        terminal.expect_exact(PROMPT)
        say(terminal, "count", "5\r\n")
        terminal.send("\x03")
        terminal.expect_exact("Ctrl-C again")
        terminal.expect_exact(PROMPT)
        terminal.send("\x03")
        terminal.expect("code 0")
        expect_sane(end_of(terminal)[1])
    expect_gone(pids(tmp_path))


def test_ctrl_c_gets_away_from_a_rank_that_does_not_listen(tmp_path: Path) -> None:
    with at_terminal(tmp_path, pause_s=5) as terminal:
        ready(terminal)
        terminal.send("deaf ear\r")
        terminal.expect_exact(SENT + "deaf")
        terminal.send("\x03")
        time.sleep(0.1)  # two that are pending at once are one
        terminal.send("\x03")
        terminal.expect_exact("Ctrl-C once more ends the chat")
        terminal.send("\x03")
        code, shown = end_of(terminal)
        assert code == 130 and "stopped by SIGINT" in shown
    expect_gone(pids(tmp_path))


def test_ctrl_c_while_loading_ends_the_run(tmp_path: Path) -> None:
    with at_terminal(tmp_path, loading_s=60, ranks=2) as terminal:
        terminal.expect_exact("loading ...")
        terminal.send("\x03")
        code, shown = end_of(terminal)
        assert code == 130 and "stopped by SIGINT" in shown and PROMPT not in shown
    expect_gone(pids(tmp_path))


def victim(folder: Path, who: str) -> int:
    console = console_of(folder)
    launcher = console.ppid()
    return {"console": console.pid, "launcher": launcher, "rank": pids(folder)[-1]}[who]


@pytest.mark.parametrize("while_answering", [False, True])
@pytest.mark.parametrize(
    ("who", "number", "code", "message"),
    [
        ("rank", signal.SIGKILL, 137, r"rank \d \(pid \d+\) was killed by SIGKILL"),
        ("console", signal.SIGKILL, 137, r"terminal \(pid \d+\) was killed by SIGKILL; the ranks were"),
        ("launcher", signal.SIGKILL, 137, ""),
        ("launcher", signal.SIGTERM, 143, "stopped by SIGTERM"),
    ],
)
def test_whoever_dies_the_terminal_is_left_sane(
    tmp_path: Path, who: str, number: signal.Signals, code: int, message: str, while_answering: bool
) -> None:
    with at_terminal(
        tmp_path, 'eval "$CHAT"; echo "code $?"; read line; stty -a', ranks=2, pause_s=0.1
    ) as terminal:
        ready(terminal)
        console = console_of(tmp_path)
        started = [*pids(tmp_path), console.pid, console.ppid()]
        if while_answering:
            terminal.send("word " * 200 + "\r")
            terminal.expect_exact(SENT + "word word")
        else:
            terminal.send("half a line")
            terminal.expect_exact("half a line")
        os.kill(victim(tmp_path, who), number)
        terminal.expect(f"code {code}\r\n")
        shown = re.sub(r"\x1b\[[^a-z]*[a-z]", "", terminal.before)
        if message:
            # On a line of its own, except after a console that could not end its line.
            own = "" if who == "console" else "(?m)^"
            assert re.search(f"{own}(the process at the )?{message}[^\n]*\r\n\\Z", shown), shown
        expect_gone(started)  # the modes are in order when all have ended
        terminal.send("\r")
        expect_sane(end_of(terminal)[1])


def test_ctrl_z_and_fg_bring_the_prompt_back(tmp_path: Path) -> None:
    with at_terminal(tmp_path, "exec bash --norc --noediting -i", pause_s=0.05) as terminal:
        terminal.send("set -o monitor; PS1='shell'$\r")
        terminal.send('eval "$CHAT"\r')
        ready(terminal)
        terminal.send("half a")
        terminal.expect_exact("half a")
        terminal.send("\x1a")
        terminal.expect_exact("Stopped")
        terminal.expect_exact("shell$")
        terminal.send("stty -a\r")
        terminal.expect_exact("shell$")
        expect_sane(terminal.before)
        assert psutil.Process(pids(tmp_path)[0]).is_running()
        terminal.send("fg\r")
        terminal.expect_exact(PROMPT + "half a")
        say(terminal, " line", "half a line\r\n[")
        terminal.send("word " * 40 + "\r")  # and in an answer
        terminal.expect_exact(SENT + "word word")
        terminal.send("\x1a")
        terminal.expect_exact("shell$")
        terminal.send("fg\r")
        terminal.expect(r"\[40 tokens")
        terminal.expect_exact(PROMPT)
        terminal.send("\x04")
        terminal.expect_exact("shell$")
        terminal.send("exit\r")
        terminal.expect(pexpect.EOF)
    expect_gone(pids(tmp_path))


def test_ctrl_z_without_a_shell_does_nothing(tmp_path: Path) -> None:
    with at_terminal(tmp_path) as terminal:
        ready(terminal)
        terminal.send("\x1a")
        say(terminal, "one", "one\r\n[")
        terminal.send("\x04")
        assert end_of(terminal)[0] == 0
