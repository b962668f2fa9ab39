"""Standard input, output and error of a program: sound before its first word, lost without a traceback.

Every program of Yoke runs inside `running`, and speaks by `show`, `show_json` and `say`. Then these
hold in all of them. A character that an encoding does not have comes out as a replacement, or in JSON
as an escape. A stream that was closed (`>&-`) is /dev/null: otherwise the next file that is opened
would take its number, and be written into. Output that nobody reads (`| head`) ends the program in
silence; output that cannot be written (a full disk) ends it with one message. Messages that cannot be
written are lost, and nothing else with them.

Not here: what a program prints that `run` starts; it has the streams that python gives it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO

LOST = os.EX_IOERR  # the exit code where output could not be written
UNREAD = 141  # and where nobody read it: as the shell tells of SIGPIPE
# What python does with characters that an encoding does not have; its other ways may raise.
_HARMLESS = {"replace", "ignore", "backslashreplace", "xmlcharrefreplace", "namereplace"}


class OutputError(OSError):
    """stdout cannot be written. `exit_code` is the program's."""

    @property
    def exit_code(self) -> int:
        return UNREAD if self.errno == errno.EPIPE else LOST

    @property
    def message(self) -> str:
        """For the person; "" where nobody reads, which is no mistake."""
        if self.errno == errno.EPIPE:
            return ""
        return f"standard output cannot be written ({self.strerror})"


def running(main: Callable[[], int]) -> int:
    """Put the streams in order and run a program; its exit code, LOST or UNREAD."""
    prepare()
    try:
        try:
            code = main()
        except SystemExit as end:  # argparse has shown its help
            if end.code is not None and not isinstance(end.code, int):
                raise
            code = end.code or 0
        with writing():
            return code
    except OutputError as error:
        silence(sys.stdout)
        if error.message:
            say(f"error: {error.message}")
        return error.exit_code
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            silence(sys.stderr)


def prepare() -> None:
    """Open what is closed, and have no stream raise for a character. stdout is then a file that cannot
    be written, so that what is shown is missed."""
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        _plug(number, flags)
    if sys.stdin is None:
        sys.stdin = _open(0, "r")
    if sys.stdout is None:
        sys.stdout = _open(1, "w")
    if sys.stderr is None:
        sys.stderr = _open(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) not in _HARMLESS and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _plug(number: int, flags: int) -> None:
    with suppress(OSError):
        fcntl.fcntl(number, fcntl.F_GETFD)
        return
    opened = os.open(os.devnull, flags)  # the lowest number that is free: this one
    os.set_inheritable(opened, True)
    assert opened == number


def _open(number: int, mode: str) -> TextIO:
    return open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # type: ignore


def is_writable(stream: IO[str]) -> bool:
    """Whether there is anything to write into, after `prepare`."""
    try:
        flags = fcntl.fcntl(stream.fileno(), fcntl.F_GETFL)
    except OSError:  # a stream without a file, as tests have them
        return True
    return flags & os.O_ACCMODE != os.O_RDONLY


@contextmanager
def writing() -> Iterator[None]:
    """A block that writes on stdout, which is flushed at its end. Raises OutputError."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


# What a text must not do to a terminal: all control characters but tab and line feed.
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
# What JSON need not escape, and terminals obey or other readers take for the end of a line.
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(127, 160), 0x2028, 0x2029)}


def printable(text: str) -> str:
    """The text without control characters: escape sequences would move the cursor, and worse."""
    return text.translate(_CONTROL)


def show(text: str, end: str = "\n", escapes: bool = False) -> None:
    """A text on stdout, at once; without control characters where a terminal would obey them, unless
    they are our own (`escapes`). Raises OutputError."""
    if not escapes and sys.stdout.isatty():
        text = printable(text)
    with writing():
        sys.stdout.write(text + end)


def show_json(data: Any) -> None:
    """One line of JSON on stdout, at once: in the characters that it has, else in ASCII escapes.
    Raises OutputError."""
    text = json.dumps(data, ensure_ascii=False).translate(_ESCAPED)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data)
    show(text)


def say(message: str) -> None:
    """A message on stderr, at once, without control characters: it may quote what a file holds. Where
    that cannot be written nobody can be told."""
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: IO[str]) -> None:
    """Let what a stream holds back and what follows go nowhere: the interpreter would try once more
    at its end, and complain."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
