"""The errors that communication between ranks can raise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# The messages for a peer that is late, dead or calls another operator: ours (csrc/channel.cpp), gloo's.
_OWN = re.compile(r"[\w ]+ \(step \d+\): rank \d+ (waited|calls) |this group failed earlier ")
_GLOO = re.compile(r"\[[^\]]*/gloo/[^\]]*\] (.*)")


class CommError(RuntimeError):
    """A group could not be opened, or a peer did not answer in time. The message is complete."""

    exit_code = 1


class PeerError(CommError):
    """A peer did not answer: it is late, dead or out of step. If it failed, its own error says why."""

    of_peer = True


class BuildError(CommError):
    """The shared-memory extension could not be compiled. The message holds the compiler's output."""


class SpaceError(CommError):
    """/dev/shm is too small or not writable. The message says how much is free, how much is needed and
    how to get it."""

    exit_code = 2


@contextmanager
def converting_errors(rank: int) -> Iterator[None]:
    """Convert errors that operators raise for a peer that is late, dead or out of step to PeerError."""
    try:
        yield
    except CommError:
        raise
    except RuntimeError as error:
        text = str(error).strip()
        line = text.splitlines()[0] if text else ""
        gloo = _GLOO.search(text)
        if _OWN.match(line):
            raise PeerError(line) from error
        if gloo is not None or type(error).__name__ in ("DistBackendError", "DistNetworkError"):
            line = gloo[1].strip() if gloo is not None else line
            raise PeerError(f"rank {rank} stopped waiting for other ranks: {line}") from error
        raise
