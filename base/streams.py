"""Standard input, output and error of a program: usable from the start, and errors without a traceback.

Every program of Yoke runs inside `running`, and prints by `show`, `show_json` and `say`. So these rules
hold in all of them. A character that the encoding lacks is printed as a replacement, or in JSON as an
escape. A stream that was closed (`>&-`) becomes /dev/null: otherwise the next file to be opened would
get its number, and output would go into that file. Output that nobody reads (`| head`) ends the program
silently; output that cannot be written (a full disk) ends it with one message. A message that cannot be
written to stderr is dropped, and the program continues.

Not here: the output of a program that `run` starts; it has the streams that python gives it.
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

LOST = os.EX_IOERR  # the exit code if output could not be written
UNREAD = 141  # the exit code if nobody read it: 128 + SIGPIPE, as in a shell
# python's error handlers that never raise for characters that an encoding lacks.
_HARMLESS = {"replace", "ignore", "backslashreplace", "xmlcharrefreplace", "namereplace"}


class OutputError(OSError):
    """stdout cannot be written. `exit_code` is the exit code of the program."""

    @property
    def exit_code(self) -> int:
        return UNREAD if self.errno == errno.EPIPE else LOST

    @property
    def message(self) -> str:
        """The error message; "" if nobody reads stdout, which is not an error."""
        if self.errno == errno.EPIPE:
            return ""
        return f"standard output cannot be written ({self.strerror})"


def running(main: Callable[[], int]) -> int:
    """Prepare the streams and run a program; return its exit code, LOST or UNREAD."""
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
    """Open /dev/null for closed streams, and make no stream raise for a character. A closed stdout is
    opened read-only, so that writing to it fails and is reported."""
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
    opened = os.open(os.devnull, flags)  # gets the lowest free number, which is `number`
    os.set_inheritable(opened, True)
    assert opened == number


def _open(number: int, mode: str) -> TextIO:
    return open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # type: ignore


def is_writable(stream: IO[str]) -> bool:
    """Whether the stream can be written to, after `prepare`."""
    try:
        flags = fcntl.fcntl(stream.fileno(), fcntl.F_GETFL)
    except OSError:  # a stream without a file descriptor, as in tests
        return True
    return flags & os.O_ACCMODE != os.O_RDONLY


@contextmanager
def writing() -> Iterator[None]:
    """A block that writes to stdout, which is flushed at its end. Raises OutputError."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


# What a terminal must not receive from a text: all control characters but tab and line feed.
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
# Characters that JSON need not escape, but that terminals obey or other readers treat as a line end.
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(127, 160), 0x2028, 0x2029)}


def printable(text: str) -> str:
    """The text with control characters replaced: escape sequences could move the cursor, or worse."""
    return text.translate(_CONTROL)


def show(text: str, end: str = "\n", escapes: bool = False) -> None:
    """Print a text on stdout and flush. On a terminal, control characters are replaced unless they are
    our own (`escapes`). Raises OutputError."""
    if not escapes and sys.stdout.isatty():
        text = printable(text)
    with writing():
        sys.stdout.write(text + end)


def show_json(data: Any) -> None:
    """Print one line of JSON on stdout and flush; with ASCII escapes if the encoding lacks a character.
    Raises OutputError."""
    text = json.dumps(data, ensure_ascii=False).translate(_ESCAPED)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data)
    show(text)


def say(message: str) -> None:
    """Print a message on stderr and flush, with control characters replaced: it may quote a file. If
    stderr cannot be written, the message is dropped."""
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: IO[str]) -> None:
    """Discard what a stream has buffered and what follows: otherwise the interpreter would flush it
    again at exit, and print an error."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
