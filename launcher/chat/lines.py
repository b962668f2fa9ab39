"""What a person types: turns of one or more lines, and their history on disk.

A line that ends with a backslash continues in the next; three quotation marks begin a turn that ends at
the next three. readline edits the lines, if Python has it. The history is Yoke's own file (a JSON
string on each line), since readline's file cannot hold a turn of several lines.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from base.folders import state_home

try:
    import readline
except ImportError:  # a Python built without readline: the terminal edits the lines
    readline = None  # type: ignore[assignment]

_FENCE = '"""'
_MAX_HISTORY = 1000


@dataclass(frozen=True)
class Turn:
    """One turn of the user. `command`: it began with a slash."""

    text: str
    command: bool


class AbandonedError(Exception):
    """Ctrl-C at the prompt. `empty`: the prompt was empty."""

    def __init__(self, empty: bool) -> None:
        self.empty = empty


class ResumedError(Exception):
    """Back from Ctrl-Z at the prompt: draw it again, with what was typed."""

    def __init__(self, typed: str) -> None:
        self.typed = typed


def read_turn(next_line: Callable[[bool], str]) -> Turn:
    """Read one turn from `next_line(continued)`, which raises EOFError at the end of the input. In the
    middle of a turn the end of the input ends the turn; before it, EOFError is raised."""
    first = next_line(False)
    if first.lstrip().startswith(_FENCE):
        lines = [first.lstrip()[len(_FENCE) :]]
        while not lines[-1].rstrip().endswith(_FENCE):
            try:
                lines.append(_continuation(next_line))
            except EOFError:
                break
        return Turn("\n".join(lines).rstrip().removesuffix(_FENCE).strip(), False)
    lines = [first]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        with suppress(EOFError):
            lines.append(_continuation(next_line))
    return Turn("\n".join(lines).strip(), first.startswith("/"))


def _continuation(next_line: Callable[[bool], str]) -> str:
    try:
        return next_line(True)
    except AbandonedError:
        raise AbandonedError(empty=False) from None


def line_from_pipe(_: bool) -> str:
    """The next line of stdin. Raises EOFError."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


def line_from_person(prompt: str) -> str:
    """A line from the editor; after Ctrl-Z the prompt is redrawn. Raises EOFError, AbandonedError."""
    typed = ""
    while True:
        try:
            if readline is not None:
                readline.set_startup_hook(partial(readline.insert_text, typed))
            return input(prompt)
        except ResumedError as resumed:
            typed = resumed.typed


def typed_so_far() -> str:
    """The text at the prompt that has not been sent yet."""
    return "" if readline is None else readline.get_line_buffer()


def marks_escapes() -> bool:
    """Whether the prompt may have colors: the editor must support marking them as zero width."""
    return readline is not None and "libedit" not in (readline.__doc__ or "")


def history_path() -> Path | None:
    """The path of the history, by the XDG base directory specification; None without a home folder."""
    state = state_home()
    return None if state is None else state / "yoke" / "history"


def open_editor(path: Path | None) -> None:
    """Set readline up, with the turns of earlier chats."""
    if readline is None:
        return
    readline.set_auto_history(False)  # turns, not lines
    if "libedit" not in (readline.__doc__ or ""):
        # A pasted text is one turn, even if it has several lines.
        readline.parse_and_bind("set enable-bracketed-paste on")
    for turn in [] if path is None else load_history(path):
        readline.add_history(turn)


def load_history(path: Path) -> list[str]:
    """The last 1000 turns, oldest first. Lines that are not JSON strings are skipped."""
    turns = []
    with suppress(OSError):
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError):
                turn = json.loads(line)
                if isinstance(turn, str) and "\0" not in turn:
                    turns.append(turn)
        if len(turns) > 2 * _MAX_HISTORY:
            new = path.with_suffix(f".{os.getpid()}")
            with _open_private(new) as file:
                file.writelines(json.dumps(turn) + "\n" for turn in turns[-_MAX_HISTORY:])
            new.replace(path)
    return turns[-_MAX_HISTORY:]


def remember(turn: Turn, path: Path | None) -> None:
    """Add a turn to the history, for the arrow keys in this chat and later ones. Errors of the disk are
    ignored."""
    # A text in quotation marks may begin with a slash. The space keeps it from being a command later.
    text = turn.text if turn.command or not turn.text.startswith("/") else f" {turn.text}"
    if readline is not None and "\0" not in text:
        readline.add_history(text)
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _open_private(path) as file:
                file.write(json.dumps(text) + "\n")


def _open_private(path: Path) -> IO[str]:
    """Open a file to append, readable by this user alone: what people write to a model is private."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a")
