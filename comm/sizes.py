"""How much shared memory a group needs. Does not import torch, so that the launcher can check it."""

from __future__ import annotations

_PAGE = 4096


def slot_bytes(size: int) -> int:
    """Bytes of one of a rank's two buffers, in a group of `size` ranks.

    A decode step moves a few KiB; larger messages are sent in pieces that stay in the caches. The more
    ranks, the smaller the buffers, so that up to 64 ranks take 16 MiB at most.
    """
    return max(128 * 1024, min(512 * 1024, 8 * 1024 * 1024 // size // _PAGE * _PAGE))


def segment_bytes(size: int) -> int:
    """Bytes in /dev/shm of a group of `size` ranks: two buffers and 128 control bytes per rank, and the
    header page."""
    return 2 * size * slot_bytes(size) + (128 * size // _PAGE + 2) * _PAGE
