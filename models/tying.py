"""Whether a model's head is tied to its embedding: the config's claim, checked against the weights.

Some files hold a head although their config ties it. If the two are equal, one tensor serves as both.
If they differ, the config is wrong and the head was trained separately, so the stored head is used, as
in transformers.

What is not here: GGUF files, which have no such key; a head that they store is used
(models.config_gguf).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from comm import ops
from comm.group import Group
from models.config import EMBEDDING, HEAD, ModelConfig
from weights.checkpoint import Checkpoint, Entry
from weights.pages import release_pages

BLOCK_BYTES = 8 << 20  # bytes of each of the two that are compared at once, in float32


def settle_head(
    config: ModelConfig, checkpoint: Checkpoint, group: Group, say: Callable[[str], None]
) -> ModelConfig:
    """`config`, with the tie removed if the checkpoint holds a head that differs from the embedding;
    `say` is then called with a line. All ranks call this; if they can communicate, each compares a
    part."""
    head, embedding = checkpoint.entries.get(HEAD), checkpoint.entries.get(EMBEDDING)
    if not config.tie_embeddings or head is None or embedding is None:
        return config
    if head.shape == embedding.shape and head.scheme == embedding.scheme:
        rank, size = (group.rank, group.size) if group.backend != "none" else (0, 1)
        count = head.shape[0]
        differs = not _equal(head, embedding, slice(count * rank // size, count * (rank + 1) // size))
        if size > 1:
            found = torch.tensor([float(differs)], device=_device(group))
            differs = bool(ops.all_reduce(found, group) > 0)
        release_pages(checkpoint.files)
        if not differs:
            return config
    say(
        f"{checkpoint.path} holds a head (lm_head.weight) that differs from the embedding, although "
        "its config ties the two (tie_word_embeddings); the stored head is used"
    )
    return replace(config, tie_embeddings=False)


def _equal(one: Entry, other: Entry, rows: slice) -> bool:
    """Whether two matrices of the same shape are equal in these rows."""
    columns = slice(0, one.shape[1])
    step = max(1, BLOCK_BYTES // (4 * max(one.shape[1], 1)))
    for start in range(rows.start, rows.stop, step):
        part = (slice(start, min(start + step, rows.stop)), columns)
        left, right = ((entry.peek or entry.read)(part) for entry in (one, other))
        if left.dtype != right.dtype:
            left, right = left.float(), right.float()
        if not torch.equal(left, right):
            return False
    return True


def _device(group: Group) -> str:
    return "cuda" if group.backend == "nccl" else "cpu"
