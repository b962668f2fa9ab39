"""`chat` through real pseudo-terminals and pipes, with real ranks that only repeat what they hear
(tests/targets/echo_chat.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pytest

from launcher.chat.view import greeting
from tests.running import CHECKOUT, RunYoke

MODULE = "tests.targets.echo_chat"
# readline asks for pasted texts in brackets while it has the line, and until Enter is pressed.
PROMPT, MORE, SENT = "\x1b[?2004h> ", "\x1b[?2004h... ", "\x1b[?2004l\r"


def command(folder: Path, **options: Any) -> list[str]:
    for file in (folder / "end", *folder.glob("pid-*")):
        file.unlink(missing_ok=True)
    return [sys.executable, "-m", MODULE, json.dumps({"folder": str(folder), **options})]


def piped(folder: Path, text: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, **options), input=text, capture_output=True, text=True, timeout=60, cwd=CHECKOUT
    )


@contextmanager
def at_terminal(folder: Path, wrap: str = "", **options: Any) -> Iterator[pexpect.spawn]:
    """A chat in a terminal of 24 by 100; with `wrap`, a shell's command in which CHAT stands for it."""
    words = command(folder, **options)
    env = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "XDG_STATE_HOME": str(folder / "state")}
    env |= {"INPUTRC": "/dev/null"}
    env.pop("PROMPT_COMMAND", None)
    if wrap:
        env |= {"CHAT": f"{words[0]} -m {MODULE} '{words[-1]}'"}
        words = ["sh", "-c", f"trap : INT; {wrap}"]  # it shares the terminal's Ctrl-C
    terminal = pexpect.spawn(
        words[0],
        words[1:],
        env=env,
        cwd=str(CHECKOUT),
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 100),
    )
    terminal.delaybeforesend = None
    try:
        yield terminal
    finally:
        terminal.close(force=True)


def ready(terminal: pexpect.spawn) -> None:
    terminal.expect("echo \\| room for 100 tokens \\| words\r\n/help lists")
    terminal.expect_exact(PROMPT)


def say(terminal: pexpect.spawn, text: str, answer: str) -> None:
    """Type a line, hear this at once, and read on to the next prompt."""
    terminal.send(text + "\r")
    terminal.expect_exact(SENT + answer)
    terminal.expect_exact(PROMPT)


def end_of(terminal: pexpect.spawn) -> tuple[int, str]:
    """The exit code and all that was still shown."""
    terminal.expect(pexpect.EOF)
    terminal.wait()
    return terminal.exitstatus, terminal.before


def console_of(folder: Path) -> psutil.Process:
    """The process at the terminal, and with it (`parent()`) the launcher."""
    launcher = psutil.Process(int((folder / "pid-0").read_text())).parent()
    assert launcher is not None
    (found,) = [child for child in launcher.children() if "front.py" in " ".join(child.cmdline())]
    return found


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("pid-*")]


def expect_gone(started: list[int]) -> None:
    """All have ended, be it that nobody has asked for their exit codes yet."""
    deadline = time.monotonic() + 60
    while alive := [pid for pid in started if not has_ended(pid)]:
        assert time.monotonic() < deadline, [psutil.Process(pid).cmdline() for pid in alive]
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def expect_sane(shown: str) -> None:
    """`stty -a` of a terminal that a shell can use."""
    assert re.search(r"(?<!-)\bicanon\b", shown) and re.search(r"(?<!-)\becho\b", shown), shown


def test_a_pipeline_hears_the_answers_and_nothing_else(tmp_path: Path) -> None:
    text = 'one two\n\n  # three\nerror\na\\\nb\n"""\n/c\nd"""\n'
    result = piped(tmp_path, text + "/system be kind\nfirst\ncount\n/nothing\ncount")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "one two\n# three\na\nb\n/c\nd\nsystem be kind\n4\n6\n"
    assert result.stderr.splitlines() == [
        "loading ...",  # and a carriage return, which splits lines too
        "error: the conversation is too long (this turn does not count)",
        "no command /nothing; there are: /help  /reset  /system  /stats  /quit",
    ]
    expect_gone(pids(tmp_path))


def test_a_model_that_only_continues_takes_no_system_message(tmp_path: Path) -> None:
    result = piped(tmp_path, "/system be kind\nfirst\n", continues=True)
    assert (result.returncode, result.stdout) == (0, "user first\n")
    assert "no chat template, so it takes no system message" in result.stderr
    facts = {"model": "m", "max_seq_len": 9, "continues": True}
    assert greeting(facts).endswith(
        "\nthis model has no chat template: it continues each text that is typed"
    )
    assert "template" not in greeting(facts | {"continues": False})


def test_a_file_of_turns_may_end_at_any_place(tmp_path: Path) -> None:
    for text, answers in (("", ""), ('"""a\nb', "a\nb\n"), ("a\\", "a\n"), ("a\n/quit\nb\n", "a\n")):
        result = piped(tmp_path, text)
        assert (result.returncode, result.stdout) == (0, answers), (text, result.stderr)
    odd = subprocess.run(
        command(tmp_path),
        # A byte-order mark goes; a lone carriage return and U+2028 end no turn.
        input=b"\xef\xbb\xbf\xff\xfe caf\xc3\xa9\r\na\rb\xe2\x80\xa8c\ncount\n",
        capture_output=True,
        timeout=60,
        cwd=CHECKOUT,
    )
    assert (odd.returncode, odd.stdout.decode()) == (0, "\ufffd\ufffd café\na\rb\u2028c\n5\n")


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        ("die", {}, 137, "rank 0 (pid {0}) was killed by SIGKILL"),
        ("die 1", {"ranks": 2}, 137,
         "rank 1 (pid {1}) was killed by SIGKILL; the other ranks were stopped"),
        ("mistake", {"ranks": 2}, 2, "error: no such thing"),
        ("hello", {"broken": True}, 2, "error: the file is broken"),
    ],
)  # fmt: skip
def test_a_rank_that_fails_is_told_once(
    tmp_path: Path, text: str, options: dict[str, Any], code: int, message: str
) -> None:
    result = piped(tmp_path, f"hello\n{text}\nhello\n", **options)
    assert result.returncode == code
    ids = [(tmp_path / f"pid-{rank}").read_text() for rank in range(options.get("ranks", 1))]
    assert result.stderr.splitlines()[1:] == [message.format(*ids)]
    assert result.stdout == ("" if options.get("broken") else "hello\n")
    expect_gone(pids(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_launcher_of_a_pipeline_stops_all(
    tmp_path: Path, number: signal.Signals
) -> None:
    with subprocess.Popen(
        command(tmp_path, ranks=2), cwd=CHECKOUT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == "hello\n"
        console = console_of(tmp_path).pid
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number and f"stopped by {number.name}" in err
    expect_gone([*pids(tmp_path), console])


def test_a_reader_that_goes_away_ends_the_run(tmp_path: Path) -> None:
    with subprocess.Popen(
        command(tmp_path), cwd=CHECKOUT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"a b c\n")
        process.stdin.flush()
        err = process.stderr.read().decode()
        assert process.wait(20) == 141
    assert "Traceback" not in err and "exited with code 141" in err
    expect_gone(pids(tmp_path))


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
        say(terminal, "/help", "  /help         this list")
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


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["model=tiny", "weights=random", "prompt=x"], {}, "prompt= goes with generate"),
        (["model=tiny", "weights=random", "output=json"], {}, "output= goes with generate"),
        (["model=tiny", "weights=random", "--nnodes", "2"], {}, "chat needs a terminal of its own"),
        (["model=tiny", "weights=random"], {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2",
          "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
         "chat needs a terminal of its own"),
        (["weights=random"], {}, "model= is missing"),
        (["model=tiny", "weights=random", "--ranks", "64"], {}, "--ranks"),
    ],
)  # fmt: skip
def test_what_chat_cannot_do_is_refused(
    run_yoke: RunYoke, words: list[str], env: dict[str, str], message: str
) -> None:
    result = run_yoke("chat", *words, **env)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stdout == ""
