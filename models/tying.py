"""Whether a model's head is its embedding: what its config says, checked against what is stored.

Some files hold a head although their config ties it. Where the two are equal, one serves for both.
Where they differ, the config is wrong and the head was trained by itself, so it is used, as in
transformers.

What is not here: GGUF, whose files have no such key; there a stored head counts (models.config_gguf).
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

BLOCK_BYTES = 8 << 20  # of each of the two, in float32


def settle_head(
    config: ModelConfig, checkpoint: Checkpoint, group: Group, say: Callable[[str], None]
) -> ModelConfig:
    """`config`, without the tie where the checkpoint holds a head that differs from the embedding;
    `say` is called with a line on that. Each rank of a group that can communicate compares its part."""
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
    """Whether two matrices of one shape have the same numbers in these rows."""
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
