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

from engine.chat import asked_of
from engine.generate import encode_prompt
from engine.resolve import resolve
from models.tokenizer.codec import byte_codec
from tests.jobs import job_of

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
    """And so is a setting that cannot change; others hold from the next turn on."""
    chat = start(*WORDS, "max_seq_len=64", "max_new_tokens=4")
    lines = [
        "x" * 100, "hi", "/set max_seq_len=99", "/set logit_bias=512:1", "/reset",
        "/set temperature=5 seed=3", "hi", "/reset", "/set max_new_tokens=3", "hi", "/reset",
        "/set temperature=0 max_new_tokens=4", "hi",
    ]  # fmt: skip
    out, err = chat.communicate("\n".join(lines) + "\n", timeout=120)
    assert chat.returncode == 0, err
    assert "max_seq_len=64 leaves no room for an answer" in err
    assert "max_seq_len= cannot change during a chat: the cache was made for its value" in err
    assert "a token of logit_bias=512 must be an integer from 0 to 511" in err
    assert "Traceback" not in err
    answers = [line for line in out.splitlines() if not line.startswith("  ")]
    greedy, drawn, shorter, again = answers
    assert again == greedy != drawn and drawn.startswith(shorter) and drawn != shorter
    assert [line for line in out.splitlines() if line.startswith("  ")] == [
        "  temperature=5.0 seed=3", "  max_new_tokens=3", "  temperature=0.0 max_new_tokens=4",
    ]  # fmt: skip


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


@pytest.mark.parametrize("word", ["prompt=x", "prompts=x", "num_beams=2", "output=json", "logprobs=1"])
def test_what_belongs_to_generate_is_refused(word: str) -> None:
    chat = start(*WORDS, word)
    _, err = chat.communicate("", timeout=60)
    assert chat.returncode == 2
    assert "goes with generate" in err


def test_a_model_without_a_template_continues_the_last_message() -> None:
    words = ["model=tiny", "weights=random", "max_seq_len=500"]
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    codec = byte_codec(256)
    base = replace(codec, chat_templates={})
    # `chat` asks for answers that may fill the sequence; a text that goes on would do so.
    job = replace(job_of(words, need_prompt=False), max_new_tokens=499)
    prompt, most = asked_of(resolve(job), codec, messages)
    assert (prompt.messages, most) == (tuple(messages), 499)
    prompt, most = asked_of(resolve(job), base, messages)
    assert (prompt.text, prompt.messages, most) == ("two", (), 64)
    assert encode_prompt(base, prompt, 500) == base.encode("two", True)
    job = job_of([*words, "max_new_tokens=200"], need_prompt=False)
    assert asked_of(resolve(job), base, messages)[1] == 200


def test_without_a_prompt_a_terminal_gets_a_chat(tmp_path: Path) -> None:
    env = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "XDG_STATE_HOME": str(tmp_path)}
    terminal = pexpect.spawn(
        sys.executable, [str(CHECKOUT / "launch.py"), *WORDS, "max_new_tokens=3", "chat=true"],
        env=env, encoding="utf-8", timeout=60, dimensions=(24, 100),
    )  # fmt: skip
    try:
        terminal.expect_exact("/help lists the commands")
        terminal.expect_exact("> ")
        terminal.send("hello\r")
        terminal.expect(r"\[.*3 tokens")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert terminal.exitstatus == 0
    finally:
        terminal.close(force=True)


@pytest.mark.parametrize("words", [("generate",), ("output=json",), ("batch=2",)])
def test_a_terminal_that_cannot_mean_a_chat_is_asked_for_a_prompt(words: tuple[str, ...]) -> None:
    terminal = pexpect.spawn(
        sys.executable, [str(CHECKOUT / "launch.py"), *words, *WORDS], encoding="utf-8", timeout=60
    )
    terminal.expect_exact("error: prompt= is missing")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 2
