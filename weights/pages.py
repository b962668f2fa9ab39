"""Release the resident pages of mapped files: a file that is read once need not stay resident.

Pages of a mapped file count as this process's memory until the kernel reclaims them. For a control
group's limit, and in monitoring tools, a reader would seem as large as its file. Here the pages of all
mappings of a file are dropped, whichever code made them: libraries do not report their mappings.
The data stay in the page cache, so a later access does not read the disk again.
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
    """Drop the resident pages of all mappings of the files `paths`. Mappings that were written to stay,
    since their pages are the only copy. Without /proc, nothing happens."""
    with suppress(OSError):
        # Resolved, as the kernel names them: files of hub caches are links.
        files = {str(path.resolve()) for path in paths}
        shared, private = _mappings(_text("/proc/self/maps"), files)
        if private:  # only then: for smaps, the kernel checks every page for writes
            shared += _unwritten(_text("/proc/self/smaps"), files)
        for start, stop in shared:
            _libc.madvise(start, stop - start, _MADV_DONTNEED)


def _text(path: str) -> str:
    """The text of a file, not in text mode: a file name in it may contain a carriage return."""
    return os.fsdecode(Path(path).read_bytes())


def _mappings(maps: str, files: set[str]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The address ranges of the shared and of the private mappings of `files`."""
    shared: list[tuple[int, int]] = []
    private: list[tuple[int, int]] = []
    for line in maps.split("\n"):
        match = _HEADER.match(line)
        if match is not None and match[4] in files:
            found = (int(match[1], 16), int(match[2], 16))
            (shared if match[3].endswith("s") else private).append(found)
    return shared, private


def _unwritten(smaps: str, files: set[str]) -> list[tuple[int, int]]:
    """The address ranges of the private mappings of `files` that were never written to."""
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
