"""Read the small files of sysfs and proc: a line of text, a number, a set of cpus, numbered folders.

The result is None if a file is missing, cannot be read, or has no valid number: every caller has a
fallback. An invalid set of cpus raises LaunchError with the file's path: a guess could bind ranks to
the wrong cores.

What is not here: the meaning of the files.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from base.errors import LaunchError

_MAX_ID = 65535  # Linux has at most 16384 cpus; the limit keeps an invalid range from filling memory
_MAX_BYTES = 1 << 20


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """ "0-3,8" -> (0, 1, 2, 3, 8), sorted. Raises LaunchError."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise LaunchError(f"{_shown(text)} is not a list of cpus, such as 0-3,8")
        if max(len(digits or "") for digits in match.groups()) > len(str(_MAX_ID)):
            raise LaunchError(f"{_shown(part)} in a list of cpus: the largest number is {_MAX_ID}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise LaunchError(f"{part!r} in a list of cpus: the range ends before it begins")
        if last > _MAX_ID:
            raise LaunchError(f"{part!r} in a list of cpus: the largest number is {_MAX_ID}")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def parse_cpu_mask(text: str) -> tuple[int, ...]:
    """ "1,00000005" -> (0, 2, 32): hexadecimal words of 32 bits, highest first. Raises LaunchError."""
    words = text.strip().split(",")
    if not all(re.fullmatch(r"[0-9a-fA-F]{1,8}", word) for word in words):
        raise LaunchError(f"{_shown(text)} is not a mask of cpus, such as 00000000,0000000f")
    mask = functools.reduce(lambda high, word: high << 32 | int(word, 16), words, 0)
    if mask.bit_length() > _MAX_ID + 1:
        raise LaunchError(f"{_shown(text)} is a mask with cpus above {_MAX_ID}, the largest number")
    return tuple(index for index, bit in enumerate(reversed(f"{mask:b}")) if bit == "1")


def format_cpu_list(numbers: Iterable[int]) -> str:
    """(0, 1, 2, 3, 8) -> "0-3,8"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def prefix(root: Path) -> str:
    """The prefix of "/sys/..." and "/proc/..." for this root; empty for the running system."""
    return "" if root == Path("/") else str(root)


def read(path: str) -> str | None:
    """The file's text without surrounding blanks and NULs (some firmware leaves them); None if the file
    cannot be read."""
    # Raw calls: a large machine has a thousand such files, and Path.read_text takes three times as
    # long. O_NONBLOCK: a named pipe in place of a file must not block.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):  # ValueError: a path with a NUL, from a file that is not text
        return None
    try:
        data = b""
        while len(data) < _MAX_BYTES and (chunk := os.read(descriptor, 65536)):
            data += chunk
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return data.decode("ascii", errors="replace").strip("\0 \n\t")


def read_int(path: str) -> int | None:
    """The number in a file; None if the file has none."""
    text = read(path)
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,18}", text) else None


def read_list(path: str) -> tuple[int, ...] | None:
    """The cpus or nodes in a file such as `online`; None if the file is missing or empty."""
    text = read(path)
    return _parsed(parse_cpu_list, text, path) if text else None


def read_cpus(mask_path: str, list_path: str) -> tuple[int, ...] | None:
    """The cpus that the kernel lists in two forms; old kernels and recorded trees may have only one.

    The mask is tried first: old kernels cut a long list at the size of a page.
    """
    text = read(mask_path)
    return _parsed(parse_cpu_mask, text, mask_path) if text else read_list(list_path)


def names(folder: str) -> list[str]:
    """The entries of a folder, sorted; empty if the folder is missing."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


def numbered(folder: str, prefix: str) -> tuple[int, ...]:
    """The numbers N of the entries `<prefix>N`, sorted."""
    pattern = re.compile(rf"{prefix}([0-9]{{1,5}})")
    return tuple(sorted(int(m[1]) for name in names(folder) if (m := pattern.fullmatch(name))))


def _parsed(parse: Callable[[str], tuple[int, ...]], text: str, path: str) -> tuple[int, ...]:
    try:
        return parse(text)
    except LaunchError as error:
        raise LaunchError(f"{path}: {error}; use the file as the kernel wrote it") from None


def _shown(text: str) -> str:
    return repr(text.strip()[:60])
