"""The progress bar on a terminal and elsewhere, and sizes as people read them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from base.units import format_bytes

CHECKOUT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import sys
from base.progress import progress_bar
with progress_bar("loading", enabled={enabled}, in_bytes={in_bytes}) as progress:
    progress(3 << 20, 4 << 20)
print(sorted({{"rich"}} & set(sys.modules)))
"""


def drawn(enabled: bool, in_bytes: bool) -> tuple[str, str]:
    """What the program draws on a terminal of 100 columns as stderr, and what it prints."""
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(enabled=enabled, in_bytes=in_bytes)],
        cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=slave, text=True, check=True,
        env={**os.environ, "COLUMNS": "100", "TERM": "xterm"},
    )  # fmt: skip
    os.set_blocking(master, False)
    try:
        text = os.read(master, 1 << 16).decode()
    except BlockingIOError:
        text = ""
    os.close(slave)
    os.close(master)
    return text, done.stdout.strip()


def test_it_shows_bytes_and_their_rate_or_the_share() -> None:
    text, loaded = drawn(enabled=True, in_bytes=True)
    assert "loading" in text and "3.1/4.2 MB" in text and "%" not in text
    assert loaded == "['rich']"
    text, _ = drawn(enabled=True, in_bytes=False)
    assert "loading" in text and "75%" in text and "MB" not in text


def test_rich_is_imported_only_where_something_is_drawn() -> None:
    assert drawn(enabled=False, in_bytes=True) == ("", "[]")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(enabled=True, in_bytes=True)],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stderr, done.stdout.strip()) == ("", "[]")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (-(3 << 20), "-3.0 MiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert format_bytes(size) == text
