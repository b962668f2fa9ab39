"""A chat through pipes and through a pseudo-terminal (tests/targets/echo_chat.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import psutil

from tests.running import CHECKOUT

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
