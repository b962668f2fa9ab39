"""The process that has the terminal while ranks run, and the channel between it and rank 0.

A rank cannot read the terminal: it leads a process group of its own, and the kernel stops whoever
reads from the background. The launcher could, but it has ranks to look after while a person types.
Threads would be in each other's way: signals come to the main thread, which is also where an editor of
lines has to be to hear of them, and a thread that waits for a key cannot be told that a rank has died.
So the terminal gets a process of its own, in the launcher's process group. Then Ctrl-Z and `fg`, a
terminal that is closed and output in the background mean what they mean to every program; the
launcher's loop stays as it is; and each of the two can put the terminal back when the other was killed.

Where there is a person Ctrl-C is the console's to answer, and the launcher lets it pass; what ends the
run is then the console's end. In a pipeline Ctrl-C stops the run as always.

The channel is a socket with a JSON object on each line, in UTF-8:

    console -> rank 0   {"id": n, "messages": [{"role": str, "content": str}, ...]}
                        {"cancel": n}
                        (its end: the rank ends, with exit code 0)
    rank 0 -> console   {"ready": {"model": str, "max_seq_len": int, ...}}     once
                        {"id": n, "text": str}                                 a piece of the answer
                        {"id": n, "done": {"finish": "stop" | "length" | "cancelled",
                            "prompt_tokens": int, "cached_tokens": int, "tokens": int,
                            "ttft_s": float, "tpot_s": float, "text": str}}    the whole answer
                        {"id": n, "error": str}                                not this one

Rank 0 must not wait in a write: a console that was stopped with Ctrl-Z does not read, and the other
ranks would wait for rank 0 until their deadline.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from base.errors import LaunchError
from base.streams import LOST
from launcher.chat.terminal import Modes, read_modes, restore

# With nothing but the standard library: its start must not depend on what is installed.
CHAT = (sys.executable, "-I", "-S", str(Path(__file__).resolve().parent / "front.py"))
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Console:
    """The started process, and the terminal's modes before it (None: it has no person)."""

    process: subprocess.Popen[bytes]
    modes: Modes | None

    @property
    def answers_interrupts(self) -> bool:
        """Whether a SIGINT is meant for it rather than for the run."""
        return self.modes is not None and self.process.poll() is None

    def failure(self) -> tuple[int, str]:
        """The run's exit code and message after it ended badly."""
        code = self.process.returncode
        if code in (-signal.SIGINT, 128 + signal.SIGINT):
            return 130, "stopped by SIGINT"
        if code == LOST:
            return code, "error: standard output cannot be written; the ranks were stopped"
        what = f"the process at the terminal (pid {self.process.pid})"
        if code >= 0:
            return code, f"{what} ended with exit code {code}; the ranks were stopped"
        name = signal.Signals(-code).name
        return 128 - code, f"{what} was killed by {name}; the ranks were stopped"


def start_console(command: Sequence[str], stack: ExitStack) -> tuple[Console, socket.socket]:
    """Start `command FD PID`, with the descriptor of its end of the channel and the launcher's id; the
    other end is for rank 0. Raises LaunchError."""
    ours, theirs = socket.socketpair()
    stack.enter_context(theirs)
    modes = read_modes()
    if modes is not None:
        # Ctrl-Z reaches both; the console stops the two of them when the terminal is in order.
        # Not SIG_IGN, which the ranks would inherit.
        previous = signal.signal(signal.SIGTSTP, lambda *_: None)
        stack.callback(signal.signal, signal.SIGTSTP, previous)
    # A Ctrl-C before it can answer waits until it can.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process = subprocess.Popen(
            [*command, str(ours.fileno()), str(os.getpid())], pass_fds=[ours.fileno()]
        )
    except OSError as error:
        raise LaunchError(f"the process at the terminal cannot be started: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ours.close()
    console = Console(process, modes)
    stack.callback(lambda: end_console(console) if process.poll() is None else None)
    return console, theirs


def end_console(console: Console) -> None:
    """See it end, and leave the terminal as it was."""
    process = console.process
    process.terminate()
    process.send_signal(signal.SIGCONT)  # it may be stopped
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    restore(console.modes)
