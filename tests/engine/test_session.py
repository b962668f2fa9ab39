"""A chat from end to end: the command with real ranks, turn after turn, over pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest

from base.errors import InputError
from engine.chat import check_chat
from models.tokenizer.codec import byte_codec

CHECKOUT = Path(__file__).resolve().parent.parent.parent
WORDS = ("model=tiny", "weights=random", "compile=false", "dtype=float32")


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            str(CHECKOUT / "launch.py"),
            "--bind-cores-to-rank",
            "--ranks=2",
            "chat",
            *words,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_turns_go_on_from_what_is_cached() -> None:
    chat = start(*WORDS, "max_new_tokens=6")
    out, err = chat.communicate("hello\nand more\n/stats\n", timeout=120)
    assert chat.returncode == 0, err
    figures = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    # What the template writes around the turns: "user: hello\nassistant:", then an answer of 6 tokens,
    # whose last was never run, and the next turn.
    assert "2 in this conversation" in figures["turns"]
    assert "prompt tokens last" in figures["cached"]
    cached = int(figures["cached"].split()[1])
    assert cached >= len("user: hello\nassistant:")


def test_a_conversation_that_is_too_long_is_refused_and_the_chat_goes_on() -> None:
    chat = start(*WORDS, "max_seq_len=64", "max_new_tokens=4")
    out, err = chat.communicate("x" * 100 + "\nhi\n", timeout=120)
    assert chat.returncode == 0, err
    assert "max_seq_len=64 leaves no room for an answer" in out + err
    assert "Traceback" not in err


@pytest.fixture
def long_answer() -> Iterator[subprocess.Popen[str]]:
    chat = start("model=tiny", "weights=random", "compile=false", "max_seq_len=2000", "num_layers=8")
    assert chat.stdin is not None
    chat.stdin.write("talk\n")
    chat.stdin.flush()
    yield chat
    chat.kill()
    chat.communicate()


def test_it_ends_soon_when_the_input_ends_or_it_is_stopped(long_answer: subprocess.Popen[str]) -> None:
    assert long_answer.stdout is not None
    assert os.read(long_answer.stdout.fileno(), 10)  # in the middle of an answer
    long_answer.send_signal(signal.SIGTERM)
    assert long_answer.wait(60) == 128 + signal.SIGTERM


def test_control_c_stops_the_answer_and_not_the_chat(tmp_path: Path) -> None:
    words = ["--ranks=2", "chat", "model=tiny", "weights=random", "num_layers=12", "compile=false"]
    env = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "XDG_STATE_HOME": str(tmp_path)}
    terminal = pexpect.spawn(
        sys.executable, [str(CHECKOUT / "launch.py"), *words, "max_seq_len=2000"],
        env=env, encoding="utf-8", timeout=60, dimensions=(24, 100),
    )  # fmt: skip
    try:
        terminal.expect_exact("> ")
        terminal.send("talk\r")
        terminal.expect("<[0-9]+>")  # some of the answer
        terminal.sendintr()
        terminal.expect_exact("> ")
        terminal.send("/stats\r")
        terminal.expect("1 in this conversation")
        terminal.expect_exact("> ")
        terminal.send("/quit\r")
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert terminal.exitstatus == 0
    finally:
        terminal.close(force=True)


@pytest.mark.parametrize("word", ["prompt=x", "prompts=x", "num_beams=2", "output=json"])
def test_what_belongs_to_generate_is_refused(word: str) -> None:
    chat = start(*WORDS, word)
    _, err = chat.communicate("", timeout=60)
    assert chat.returncode == 2
    assert "goes with generate" in err


def test_a_model_without_a_template_is_refused() -> None:
    codec = byte_codec(256)
    check_chat(codec, "tiny")
    with pytest.raises(InputError, match="model=base has no chat template"):
        check_chat(replace(codec, chat_templates={}), "base")
