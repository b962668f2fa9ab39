"""Plain texts that somebody else made: where a line ends, and a byte-order mark at the beginning.

A line ends with a line feed, with or without one carriage return before it, and nowhere else.
`splitlines` also cuts at U+2028, U+0085, form feeds and others, which are part of what people write;
and reading in text mode turns a lone carriage return into the end of a line.

What is not here: JSON (weights/files.py), and what a line means.
"""

from __future__ import annotations

import codecs
import re

_HALF = re.compile("[\ud800-\udfff]")


def without_mark(data: bytes) -> bytes:
    """UTF-8 without the byte-order mark that some editors write first."""
    return data.removeprefix(codecs.BOM_UTF8)


def lines_of(data: bytes) -> list[bytes]:
    """The lines of a text without their ends. What follows the last end is one unless it is empty."""
    lines = [line.removesuffix(b"\r") for line in without_mark(data).split(b"\n")]
    return lines[:-1] if lines[-1] == b"" else lines


def not_unicode(text: str) -> str:
    """Why a text has no UTF-8: half a surrogate pair, as JSON may write one. "" for a text that is
    all right."""
    half = _HALF.search(text)
    if half is None:
        return ""
    return f"{half.group()!r} at position {half.start()} is no character; give it as UTF-8"
