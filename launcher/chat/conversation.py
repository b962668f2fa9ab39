"""A conversation at the terminal: `launcher.chat.console` starts this process, which talks with rank 0.

It has one thread. While it waits for rank 0, a Ctrl-C wakes it and becomes a request to stop the
answer. While it waits for a line, the signal's handler raises: that is the way to leave Python's
input() early. When the run ends for any other reason, a SIGTERM ends this process: from the launcher
or, if that was killed, from the kernel.

In a pipeline each line of stdin is a turn. Only answers and the output of commands go to stdout; errors
go to stderr.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import termios
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.errors import InputError
from base.folders import expand
from base.streams import OutputError, printable, say, show, silence
from launcher.bind import die_with_parent
from launcher.chat import view as view
from launcher.chat.files import load_messages, save_messages
from launcher.chat.lines import (
    AbandonedError,
    ResumedError,
    Turn,
    history_path,
    line_from_person,
    line_from_pipe,
    marks_escapes,
    open_editor,
    read_turn,
    remember,
    typed_so_far,
)
from launcher.chat.link import (
    Done,
    EndedError,
    InterruptedByKeyError,
    Link,
    Message,
    read_done,
    receive,
    send,
    take_interrupts,
)
from launcher.chat.terminal import (
    Modes,
    apply,
    can_be_continued,
    knows_escapes,
    read_modes,
    restore,
    turn_echo_off,
)


@dataclass
class Chat:
    """A chat session. `modes` are the modes of the terminal before it, None in a pipeline."""

    link: Link
    modes: Modes | None
    history: Path | None
    max_seq_len: int = 0
    continues: bool = False  # the model has no chat template: it continues each message
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)  # without the system message
    answers: list[Done] = field(default_factory=list)  # of the whole session
    last: Done | None = None  # of the conversation; None after one was loaded
    turns: int = 0  # of the conversation
    requests: int = 0
    at_prompt: bool = False
    at_line_start: bool = True
    launcher: int = -1  # a descriptor (pidfd) of the launcher's process


def main(fd: int, launcher_pid: int) -> int:
    """Chat until the user ends it (returns 0), presses Ctrl-C while the model loads or three times in
    an answer (130), or rank 0 has ended (0: the launcher decides the exit code)."""
    if sys.stdin is not None:
        # A piped file may begin with a byte-order mark. Only line feeds end a line.
        encoding = "utf-8" if sys.stdin.isatty() else "utf-8-sig"
        sys.stdin.reconfigure(encoding=encoding, errors="replace", newline="\n")  # type: ignore[union-attr]
    if sys.stdout is not None:
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    modes = read_modes()
    path = None if modes is None else history_path()
    chat = Chat(Link(socket.socket(fileno=fd), read_end), modes, path)
    try:
        _catch_signals(chat, write_end)
        die_with_parent(launcher_pid, signal.SIGTERM)
        chat.launcher = os.pidfd_open(launcher_pid)
        if modes is not None:
            turn_echo_off(modes)
            open_editor(path)
        facts = receive(chat.link)["ready"]
        chat.max_seq_len = facts["max_seq_len"]
        chat.continues = facts.get("continues", False)
        if modes is not None:
            # Overwrite what a progress bar may have left on this line.
            show("\r\x1b[K" if knows_escapes() else "\n", end="", escapes=True)
            _note(chat, printable(view.greeting(facts)))
        _converse(chat)
        return 0
    except EndedError:
        return 0
    except InterruptedByKeyError:
        return 130
    except OutputError as error:  # the launcher prints it
        silence(sys.stdout)
        return error.exit_code
    finally:
        if chat.at_prompt or (modes is not None and not chat.at_line_start):
            with suppress(OutputError):
                show("")
        restore(modes)
        # Keep the channel open: rank 0 must not see it close, and exit, before this process has ended.
        chat.link.channel.detach()


def _catch_signals(chat: Chat, wakeup: int) -> None:
    """Install handlers: signals end, wake or suspend the chat."""

    def end(number: int, _: Any) -> None:
        for other in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)  # it is already ending
        raise SystemExit(128 + number)

    def interrupt(_: int, __: Any) -> None:
        if chat.at_prompt:
            raise AbandonedError(empty=not typed_so_far())

    def suspend(_: int, __: Any) -> None:
        if not can_be_continued():
            return
        now, typed = termios.tcgetattr(0), typed_so_far()
        restore(chat.modes)
        # Stop the launcher first: the shell reacts to it. From here on we do not touch the terminal.
        signal.pidfd_send_signal(chat.launcher, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if chat.at_prompt:
            raise ResumedError(typed)
        apply(now)

    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, end)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # Ctrl-\ makes the ranks print their stacks
    if chat.modes is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher stops the run
    else:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTSTP, suspend)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _converse(chat: Chat) -> None:
    """Read and answer turns until the input ends or the user quits."""
    warned = False
    while True:
        try:
            turn = read_turn(lambda continued: _next_line(chat, continued))
        except EOFError:
            if chat.modes is not None:
                _write(chat, "\n")
            return
        except AbandonedError as abandoned:
            _write(chat, "\n")
            if abandoned.empty and warned:
                return
            warned = abandoned.empty
            if warned:
                _note(chat, "Ctrl-C again, Ctrl-D or /quit ends the chat")
            continue
        warned = False
        if not turn.text:
            continue
        if chat.modes is not None:
            remember(turn, chat.history)
        if not turn.command:
            _answer(chat, turn.text)
        elif not _execute(chat, turn):
            return


def _next_line(chat: Chat, continued: bool) -> str:
    if chat.modes is None:
        return line_from_pipe(continued)
    prompt = "... " if continued else "> "
    if _colors() and marks_escapes():
        prompt = f"\001\x1b[1;36m\002{prompt}\001\x1b[0m\002"
    apply(chat.modes)
    chat.at_prompt = True
    try:
        line = line_from_person(prompt)
    except SystemExit:
        raise  # chat.at_prompt stays True: main() ends the prompt's line
    except BaseException:
        chat.at_prompt = False
        raise
    chat.at_prompt = False
    turn_echo_off(chat.modes)
    return line


def _execute(chat: Chat, turn: Turn) -> bool:
    """Execute a command; return False if it ends the chat."""
    word, *rest = turn.text.split(maxsplit=1)
    if word == "/quit":
        return False
    if word == "/help":
        _write(chat, view.help_text() + "\n")
    elif word == "/stats":
        _write(chat, view.stats(chat.answers, chat.last, chat.turns, chat.max_seq_len) + "\n")
    elif word == "/reset":
        _reset(chat)
    elif word == "/system" and chat.continues:
        _note(chat, "this model has no chat template, so it takes no system message")
    elif word == "/system" and rest:
        chat.system = "" if rest[0] == '""' else rest[0]
        _reset(chat)
    elif word == "/system":
        _write(chat, (chat.system or "(no system message)") + "\n")
    elif word == "/set":
        _set(chat, rest[0] if rest else "")
    elif word in ("/save", "/load"):
        _use_file(chat, word, rest[0] if rest else "")
    else:
        _note(chat, view.unknown(printable(word)))
    return True


def _set(chat: Chat, text: str) -> None:
    """Change settings of the job, which rank 0 checks, and show them; without a text, show all. Raises
    EndedError, and InterruptedByKeyError at the second Ctrl-C."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        _note(chat, f"error: /set {printable(text)}: {error}")
        return
    chat.requests += 1
    send(chat.link, {"id": chat.requests, "set": words})
    message: Message = {}
    interrupts = 0
    while message.get("id") != chat.requests:
        try:
            message = receive(chat.link)
        except InterruptedByKeyError:
            interrupts += 1
            if interrupts > 1:
                raise
            _note(chat, "waiting for the settings; Ctrl-C once more ends the chat")
    if "error" in message:
        _note(chat, f"error: {printable(message['error'])}")
        return
    changed = {word.partition("=")[0] for word in words}
    _write(chat, view.settings(message["settings"], changed) + "\n")


def _use_file(chat: Chat, command: str, name: str) -> None:
    """Save the conversation in a file, or replace it by the one in a file."""
    if not name:
        _note(chat, f"{command} needs a file: {command} FILE")
        return
    path = expand(name)
    try:
        if command == "/save":
            system = [{"role": "system", "content": chat.system}] if chat.system else []
            save_messages(path, [*system, *chat.messages])
            what = "saved in"
        else:
            messages = load_messages(path)
            first = [message["content"] for message in messages[:1] if message["role"] == "system"]
            chat.system, chat.messages = first[0] if first else "", messages[len(first) :]
            chat.turns, chat.last = len(chat.messages) // 2, None
            what = "loaded from"
    except InputError as error:
        _note(chat, f"error: {printable(str(error))}")
        return
    _write(chat, f"{view.count_turns(chat.turns)} {what} {printable(str(path))}\n")


def _reset(chat: Chat) -> None:
    chat.messages.clear()
    chat.turns, chat.last = 0, None
    if chat.modes is not None:
        _note(chat, "a new conversation" + (", with the system message" if chat.system else ""))


def _answer(chat: Chat, text: str) -> None:
    """Send a turn to rank 0 and show the answer. Raises EndedError, and InterruptedByKeyError at the
    third Ctrl-C, when the user does not want to wait for the answer to stop."""
    chat.requests += 1
    number, asked = chat.requests, {"role": "user", "content": text}
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    take_interrupts(chat.link)
    send(chat.link, {"id": number, "messages": [*system, *chat.messages, asked]})
    shown, interrupts = "", 0
    while True:
        try:
            message = receive(chat.link)
        except InterruptedByKeyError:
            interrupts += 1
            if interrupts > 2:
                raise
            if interrupts == 2:
                _note(chat, "waiting for the answer to stop; Ctrl-C once more ends the chat")
            else:
                send(chat.link, {"cancel": number})
            continue
        if message.get("id") != number:
            continue
        if "text" in message:
            shown += message["text"]
            _write(chat, message["text"])
        elif "done" in message:
            _finish(chat, asked, shown, message)
            return
        elif "error" in message:
            _note(chat, f"error: {printable(message['error'])} (this turn does not count)")
            return


def _finish(chat: Chat, asked: dict[str, str], shown: str, message: Message) -> None:
    """Show the rest of an answer and its timings, and add the turn to the conversation."""
    done = read_done(message["done"])
    # Text that was held back: a character that the last token left incomplete.
    _write(chat, done.text[len(shown) :] if done.text.startswith(shown) else "")
    if not chat.at_line_start or not done.text:
        _write(chat, "\n")
    chat.messages += [asked, {"role": "assistant", "content": done.text}]
    chat.answers.append(done)
    chat.last = done
    chat.turns += 1
    if chat.modes is not None:
        _note(chat, view.figures(done))


def _write(chat: Chat, text: str) -> None:
    """Write to stdout at once."""
    if text:
        chat.at_line_start = text.endswith("\n")
        show(text, end="")


def _note(chat: Chat, text: str) -> None:
    """Show a line that is not an answer: dim on a terminal, on stderr in a pipeline."""
    if chat.modes is None:
        say(text)
        return
    start = "" if chat.at_line_start else "\n"
    chat.at_line_start = True
    shown = f"{start}\x1b[2m{text}\x1b[0m" if _colors() else f"{start}{text}"
    show(shown, escapes=True)


def _colors() -> bool:
    return knows_escapes() and not os.environ.get("NO_COLOR")
