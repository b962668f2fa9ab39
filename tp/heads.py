"""Which rank holds which query and KV heads, for any world size up to the number of query heads.

Query heads are split into contiguous runs, as evenly as possible. A rank holds the KV heads that its
query heads need. If a border between ranks cuts a group of query heads that share a KV head, both ranks
hold that KV head (PyTorch/XLA's Llama 2 post calls this KV-head replication). Nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

from base.errors import InputError


@dataclass(frozen=True)
class HeadRun:
    """Consecutive KV heads of a rank, each shared by the same number of its query heads.

    All indices are local to the rank: query heads `[q_start, q_stop)` are `kv_stop - kv_start` groups
    of equal size, in the order of KV heads `[kv_start, kv_stop)`.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int


@dataclass(frozen=True)
class Heads:
    """The heads of one rank: `[q_start, q_stop)` of the query heads, `[kv_start, kv_stop)` of the KV
    heads, and `runs`, which pair them."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    runs: tuple[HeadRun, ...]

    @property
    def num_q(self) -> int:
        return self.q_stop - self.q_start

    @property
    def num_kv(self) -> int:
        return self.kv_stop - self.kv_start


def check_world_size(num_heads: int, world_size: int) -> None:
    """Raise InputError if a rank would get no query head."""
    if world_size > num_heads:
        raise InputError(
            f"{world_size} ranks for {num_heads} query heads: each rank needs at least one; "
            f"use --ranks {num_heads} or fewer"
        )


def split_heads(num_heads: int, num_kv_heads: int, rank: int, world_size: int) -> Heads:
    """The heads of `rank`. `num_heads` must be a multiple of `num_kv_heads`. Raises InputError if a
    rank would get no query head."""
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    check_world_size(num_heads, world_size)
    group = num_heads // num_kv_heads
    q_start = num_heads * rank // world_size
    q_stop = num_heads * (rank + 1) // world_size
    kv_start, kv_stop = q_start // group, (q_stop - 1) // group + 1
    runs: list[HeadRun] = []
    for kv in range(kv_start, kv_stop):
        first = max(kv * group, q_start) - q_start
        last = min((kv + 1) * group, q_stop) - q_start
        runs = _append(runs, HeadRun(first, last, kv - kv_start, kv - kv_start + 1))
    return Heads(q_start, q_stop, kv_start, kv_stop, tuple(runs))


def _append(runs: list[HeadRun], new: HeadRun) -> list[HeadRun]:
    """Append `new`, or merge it into the last run if their groups have the same size."""
    if runs:
        last = runs[-1]
        if last.q_stop - last.q_start == (new.q_stop - new.q_start) * (last.kv_stop - last.kv_start):
            return [*runs[:-1], HeadRun(last.q_start, new.q_stop, last.kv_start, new.kv_stop)]
    return [*runs, new]
