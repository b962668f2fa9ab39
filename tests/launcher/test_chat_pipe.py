"""`chat` through pipes, with real ranks that only repeat what they hear."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.chat.view import greeting
from tests.launcher.chats import (
    command,
    console_of,
    expect_gone,
    pids,
    piped,
)
from tests.running import CHECKOUT, RunYoke


def test_a_pipeline_hears_the_answers_and_nothing_else(tmp_path: Path) -> None:
    text = 'one two\n\n  # three\nerror\na\\\nb\n"""\n/c\nd"""\n'
    result = piped(tmp_path, text + "/system be kind\nfirst\ncount\n/nothing\ncount")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "one two\n# three\na\nb\n/c\nd\nsystem be kind\n4\n6\n"
    assert result.stderr.splitlines() == [
        "loading ...",  # and a carriage return, which splits lines too
        "error: the conversation is too long (this turn does not count)",
        "no command /nothing; there are: /help  /reset  /system  /set  /save  /load  /stats  /quit",
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
