"""Letting go of the pages of mapped files: what is read once, end to end, need not stay resident.

Pages of a mapped file count as this process's memory until the kernel needs them elsewhere; a control
group's limit, and whoever watches the process, sees a reader as large as its file. They are dropped
here for all mappings under a folder, whoever made them: the libraries that map files do not say where.
The data stay in the page cache, and a later access finds them there.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ \S+ \d+ +(/.*)")


def release_pages(paths: list[Path]) -> None:
    """Drop the resident pages of mappings of files at or under `paths` (resolved). No mapping that
    was written to is touched: its pages are the only copy. Nothing happens if smaps cannot be read."""
    prefixes = tuple(str(path) for path in paths)
    current: tuple[int, int] | None = None
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
            for line in smaps:
                match = _HEADER.match(line)
                if match is not None:
                    current = (
                        (int(match[1], 16), int(match[2], 16)) if _under(match[4], prefixes) else None
                    )
                elif line[:1].isdigit() or line[:1] in "abcdef":
                    current = None  # a mapping without a file
                elif current is not None and line.startswith("Anonymous:"):
                    if line.split()[1] == "0":
                        _libc.madvise(current[0], current[1] - current[0], _MADV_DONTNEED)
                    current = None
    except OSError:
        return


def _under(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(prefix + os.sep) for prefix in prefixes)
