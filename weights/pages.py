"""Letting go of the pages of mapped files: what is read once, end to end, need not stay resident.

Pages of a mapped file count as this process's memory until the kernel needs them elsewhere; a control
group's limit, and whoever watches the process, sees a reader as large as its file. They are dropped
here for all mappings of a file, whoever made them: the libraries that map files do not say where.
The data stay in the page cache, and a later access finds them there.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ \S+ \d+ +(/.*)")


def release_pages(paths: Iterable[Path]) -> None:
    """Drop the resident pages of mappings of the files `paths`. No mapping that was written to is
    touched: its pages are the only copy. Without proc, nothing happens."""
    with suppress(OSError):
        # As the kernel names them: hub caches are full of links.
        files = {str(path.resolve()) for path in paths}
        shared, private = _mappings(_text("/proc/self/maps"), files)
        if private:  # the kernel looks through all pages to tell whether one was written: only then
            shared += _unwritten(_text("/proc/self/smaps"), files)
        for start, stop in shared:
            _libc.madvise(start, stop - start, _MADV_DONTNEED)


def _text(path: str) -> str:
    """Not in text mode: a file's name may hold a carriage return, and the kernel writes it as it is."""
    return os.fsdecode(Path(path).read_bytes())


def _mappings(maps: str, files: set[str]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The shared and the private mappings of files among `files`."""
    shared: list[tuple[int, int]] = []
    private: list[tuple[int, int]] = []
    for line in maps.split("\n"):
        match = _HEADER.match(line)
        if match is not None and match[4] in files:
            found = (int(match[1], 16), int(match[2], 16))
            (shared if match[3].endswith("s") else private).append(found)
    return shared, private


def _unwritten(smaps: str, files: set[str]) -> list[tuple[int, int]]:
    """The private mappings among them that were never written to."""
    found = []
    current: tuple[int, int] | None = None
    for line in smaps.split("\n"):
        if line.startswith("Anonymous:"):
            if current is not None and line.split()[1] == "0":
                found.append(current)
            current = None
        elif line[:1].isdigit() or line[:1] in "abcdef":
            match = _HEADER.match(line)
            ours = match is not None and match[3].endswith("p") and match[4] in files
            current = (int(match[1], 16), int(match[2], 16)) if match is not None and ours else None
    return found
