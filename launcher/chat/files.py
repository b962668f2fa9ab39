"""Conversations in files: a JSON list of messages, each with a role and a content.

A file appears whole or not at all, and readable by its user alone. What is not here: the terminal.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from base.errors import InputError

Messages = list[dict[str, str]]
_MOST_BYTES = 64 << 20


def save_messages(path: Path, messages: Sequence[dict[str, str]]) -> None:
    """Write a conversation; an earlier one in the same file is replaced. Raises InputError if the file
    exists and is no conversation, or cannot be written."""
    if os.path.lexists(path):
        try:
            load_messages(path)
        except InputError as error:
            raise InputError(f"not saved: {error}; choose a name that is free") from error
    text = json.dumps(list(messages), ensure_ascii=False, indent=1) + "\n"
    try:
        real = path.resolve()  # a link stays a link
        descriptor, name = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name[:50]}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, real)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {_reason(error)}") from error


def load_messages(path: Path) -> Messages:
    """Read a conversation. Raises InputError if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path} is not a file")
            if found.st_size > _MOST_BYTES:
                raise InputError(f"{path} has {found.st_size} bytes; no conversation is that long")
            data = file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error
    try:
        return check_messages(json.loads(data.removeprefix(b"\xef\xbb\xbf")))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a conversation, a JSON list of messages ({str(error)[:200]})"
        ) from error


def check_messages(value: Any) -> Messages:
    """The messages of a parsed file: perhaps one of the system, then turns of the user and answers of
    the assistant. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError(f"it holds a {type(value).__name__}")
    messages: Messages = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict) or entry.keys() != {"role", "content"}:
            raise ValueError(f"message {number} must be an object with 'role' and 'content'")
        if not all(isinstance(text, str) for text in entry.values()):
            raise ValueError(f"message {number}: role and content must be texts")
        messages.append(dict(entry))
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns, 1 + len(messages) - len(turns)):
        wanted = ("assistant", "user")[(number - (len(messages) - len(turns))) % 2]
        if message["role"] != wanted:
            raise ValueError(f"message {number} is of {message['role'][:50]!r}, not of {wanted!r}")
    if len(turns) % 2:
        raise ValueError("the last message has no answer")
    return messages


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
