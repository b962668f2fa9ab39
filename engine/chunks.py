"""How many tokens one call of a model takes, and how long its cache is. Free of torch: the steps
(`engine.steps`) are built with these sizes, and the estimate (`engine.memory`) counts with them."""

from __future__ import annotations

CHUNK = 512  # most prompt tokens in one call: with fewer, matmuls are bound by reading the weights
PADDED_CHUNK = 128  # the same where every call is padded to this length


def cache_length(max_seq_len: int, padded: bool) -> int:
    """Returns how many positions a cache slot needs. Padding of a last chunk is written too, so
    `padded` adds a chunk."""
    return max_seq_len + PADDED_CHUNK if padded else max_seq_len
