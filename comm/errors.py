"""What can go wrong between ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# How an operator says that a peer is late, dead or does something else (csrc/channel.cpp), and gloo.
_OWN = re.compile(r"[\w ]+ \(step \d+\): rank \d+ (waited|calls) |this group is broken since: ")
_GLOO = re.compile(r"\[[^\]]*/gloo/[^\]]*\] (.*)")


class CommError(RuntimeError):
    """A group could not be made, or a peer did not answer in time. The message says all there is."""

    exit_code = 1


class BuildError(CommError):
    """The shared-memory extension could not be compiled; the message holds what the compiler said."""


class SpaceError(CommError):
    """/dev/shm is too small or cannot be written to: the message says what there is, what is needed and
    how to get it."""

    exit_code = 2


@contextmanager
def told(rank: int) -> Iterator[None]:
    """Raise CommError in place of what operators raise when a peer is late, dead or out of step."""
    try:
        yield
    except CommError:
        raise
    except RuntimeError as error:
        text = str(error).strip()
        line = text.splitlines()[0] if text else ""
        gloo = _GLOO.search(text)
        if _OWN.match(line):
            raise CommError(line) from error
        if gloo is not None or type(error).__name__ in ("DistBackendError", "DistNetworkError"):
            line = gloo[1].strip() if gloo is not None else line
            raise CommError(f"rank {rank} waits for others no longer: {line}") from error
        raise
