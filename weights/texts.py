"""Plain text from outside: where a line ends, and the byte-order mark at the beginning.

A line ends with a line feed, with or without one carriage return before it, and nowhere else.
`splitlines` also splits at U+2028, U+0085, form feeds and others, which may be part of the text, and
reading in text mode converts a lone carriage return into a line end.

What is not here: JSON (weights/files.py), and what a line means.
"""

from __future__ import annotations

import codecs
import re

_HALF = re.compile("[\ud800-\udfff]")


def without_mark(data: bytes) -> bytes:
    """The UTF-8 bytes without the byte-order mark that some editors write at the beginning."""
    return data.removeprefix(codecs.BOM_UTF8)


def lines_of(data: bytes) -> list[bytes]:
    """The lines of a text without their line ends. The rest after the last line end is also a line,
    unless it is empty."""
    lines = [line.removesuffix(b"\r") for line in without_mark(data).split(b"\n")]
    return lines[:-1] if lines[-1] == b"" else lines


def not_unicode(text: str) -> str:
    """Why a text cannot be encoded as UTF-8: it has half a surrogate pair, which JSON can express. ""
    if it can be encoded."""
    half = _HALF.search(text)
    if half is None:
        return ""
    return f"{half.group()!r} at position {half.start()} is not a character; give it as UTF-8"
