"""How much shared memory a group takes; free of torch, so that the launcher's side can check it."""

from __future__ import annotations

_PAGE = 4096


def slot_bytes(size: int) -> int:
    """One of a rank's two buffers. A decode step moves a few KiB; larger messages go in pieces that
    stay in the caches. Many ranks get smaller ones, so that up to 64 take 16 MiB at most."""
    return max(128 * 1024, min(512 * 1024, 8 * 1024 * 1024 // size // _PAGE * _PAGE))


def segment_bytes(size: int) -> int:
    """Of a group of `size` ranks, in /dev/shm: two buffers a rank, and at most 128 bytes of control."""
    return 2 * size * slot_bytes(size) + (128 * size // _PAGE + 2) * _PAGE
