"""The process that has the terminal while ranks run, and the channel between it and rank 0.

A rank cannot read the terminal: it leads its own process group, and the kernel stops a background
process that reads. The launcher could read it, but has to watch ranks while a person types. Threads do
not work either: Python delivers signals to the main thread, so the line editor would have to run there,
and a thread that waits for a key cannot be notified that a rank has died. So a separate process in the
launcher's process group handles the terminal. Then Ctrl-Z and `fg`, a closed terminal and output in the
background behave as for every program; the launcher's loop stays unchanged; and each of the two
processes can restore the terminal when the other was killed.

If a person is at the terminal, the console handles Ctrl-C and the launcher ignores it. The run ends
when the console ends. In a pipeline Ctrl-C stops the run as usual.

The channel is a socket with a JSON object on each line, in UTF-8:

    console -> rank 0   {"id": n, "messages": [{"role": str, "content": str}, ...]}
                        {"id": n, "set": [str, ...]}                           key=value words
                        {"cancel": n}
                        (end of the stream: rank 0 exits with code 0)
    rank 0 -> console   {"ready": {"model": str, "max_seq_len": int, ...}}     once; "continues": true
                            where the model has no chat template, so that it continues each message
                        {"id": n, "text": str}                                 a piece of the answer
                        {"id": n, "done": {"finish": "stop" | "length" | "cancelled",
                            "prompt_tokens": int, "cached_tokens": int, "tokens": int,
                            "ttft_s": float, "tpot_s": float, "text": str}}    the whole answer
                        {"id": n, "settings": {key: value, ...}}               after "set": all that can
                            be changed in this way
                        {"id": n, "error": str}                                this request failed

Rank 0 must not block in a write: a console that was stopped with Ctrl-Z does not read, and the other
ranks would wait for rank 0 until their timeout.
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

# -I -S: only the standard library, so that its start does not depend on installed packages.
CHAT = (sys.executable, "-I", "-S", str(Path(__file__).resolve().parent / "front.py"))
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Console:
    """The started process, and the terminal's modes before it (None: not interactive)."""

    process: subprocess.Popen[bytes]
    modes: Modes | None

    @property
    def answers_interrupts(self) -> bool:
        """Whether the console handles a SIGINT, so that it does not end the run."""
        return self.modes is not None and self.process.poll() is None

    def failure(self) -> tuple[int, str]:
        """The run's exit code and message after the console failed."""
        code = self.process.returncode
        if code in (-signal.SIGINT, 128 + signal.SIGINT):
            return 130, "stopped by SIGINT"
        if code == LOST:
            return code, "error: standard output cannot be written; the ranks were stopped"
        what = f"the process at the terminal (pid {self.process.pid})"
        if code >= 0:
            return code, f"{what} exited with code {code}; the ranks were stopped"
        name = signal.Signals(-code).name
        return 128 - code, f"{what} was killed by {name}; the ranks were stopped"


def start_console(command: Sequence[str], stack: ExitStack) -> tuple[Console, socket.socket]:
    """Start `command FD PID` with the descriptor of its end of the channel and the launcher's pid.
    Return the console and the other end, for rank 0. Raises LaunchError."""
    ours, theirs = socket.socketpair()
    stack.enter_context(theirs)
    modes = read_modes()
    if modes is not None:
        # Ctrl-Z reaches both; the console restores the terminal, then stops both processes.
        # Not SIG_IGN, which the ranks would inherit.
        previous = signal.signal(signal.SIGTSTP, lambda *_: None)
        stack.callback(signal.signal, signal.SIGTSTP, previous)
    # SIGINT stays blocked in the console until its handler is installed.
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
    """Stop the console, with SIGKILL if needed, and restore the terminal."""
    process = console.process
    process.terminate()
    process.send_signal(signal.SIGCONT)  # it may be stopped
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    restore(console.modes)
