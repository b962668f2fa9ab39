"""Attention of a transformers model over Yoke's static cache, for any split of the heads.

It uses three extension points of the library. Two are registered under `NAME`: the attention function
(the model computes queries, keys and values, and calls it by name) and the mask function (the model's
rule says which positions attend to which, and `visible` evaluates it at the positions of each row). The
third is the cache, an object with `update`, which a model calls between the two. So sliding windows,
soft caps and sinks are the model's own.

Shapes: B batch, T tokens of this call, S cache length, H query heads of this rank, K KV heads of this
rank, h head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tp.heads import Heads

NAME = "yoke"
# Arguments that models pass to every attention function, and that are already in the mask or have no
# effect in inference. Any other argument that is set could change the result, so it is refused.
_IGNORED = {
    "dropout",
    "sliding_window",
    "chunk_size",
    "is_causal",
    "position_ids",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "cache_position",
    "past_key_values",
    "layer_past",
    "return_dict",
    "logits_to_keep",
    "layer_idx",
}


@dataclass(frozen=True)
class Split:
    """How the heads of one attention module are split over the ranks.

    `whole`: its projections are gathered, so it computes queries, keys and values of all heads, and a
    rank keeps its own. `latent`: what it caches is not per head (DeepSeek's latent attention, 2024), so
    every rank keeps all of it, and expands its own heads from it.
    """

    heads: Heads
    total_q: int
    total_kv: int
    whole: bool
    latent: bool

    def own(self, x: Tensor, kv: bool) -> Tensor:
        """This rank's heads of x [B, heads, T, h]. Raises ValueError if x has an unexpected number of
        heads."""
        if kv and self.latent:
            return x
        heads = self.heads
        start, stop = (heads.kv_start, heads.kv_stop) if kv else (heads.q_start, heads.q_stop)
        total = self.total_kv if kv else self.total_q
        wanted = total if self.whole else stop - start
        if x.shape[1] != wanted:
            raise ValueError(
                f"its attention computes {x.shape[1]} {'KV' if kv else 'query'} heads, but "
                f"{wanted} of {total} were planned"
            )
        return x[:, start:stop] if self.whole else x


class LayerCache(nn.Module):
    """Keys and values of one layer's KV heads, by position."""

    # Buffers made by `setup`: [B, K, S, h]; keys and values may differ in h.
    k: Tensor
    v: Tensor

    def __init__(self, split: Split, k_size: tuple[int, int], v_size: tuple[int, int]) -> None:
        """Sizes are (heads, h)."""
        super().__init__()
        self.split = split
        self.sizes = {"k": k_size, "v": v_size}

    def setup(self, batch_size: int, cache_len: int, like: Tensor) -> None:
        for name, (heads, head_dim) in self.sizes.items():
            cache = like.new_zeros(batch_size, heads, cache_len, head_dim)
            self.register_buffer(name, cache, persistent=False)

    @property
    def length(self) -> int:
        return self.k.shape[2]

    def write(
        self, key: Tensor, value: Tensor, positions: Tensor, row: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Write key and value [B, K, T, h] at `positions` [B, T]. Returns these rows' whole caches,
        [B, K, S, h] each."""
        rows = torch.arange(positions.shape[0], device=positions.device) if row is None else row
        where = rows.unsqueeze(1)
        self.k[where, :, positions] = key.transpose(1, 2).to(self.k.dtype)
        self.v[where, :, positions] = value.transpose(1, 2).to(self.v.dtype)
        return (self.k, self.v) if row is None else (self.k[row], self.v[row])


class Probe:
    """Stands in for a LayerCache: stores nothing, and records the sizes that a model writes."""

    def __init__(self, split: Split, length: int) -> None:
        self.split = split
        self.length = length
        self.seen: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def write(
        self, key: Tensor, value: Tensor, positions: Tensor, row: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sizes = [(part.shape[1], part.shape[3]) for part in (key, value)]
        self.seen.append((sizes[0], sizes[1]))
        return key, value


class StepCache:
    """The cache that a model sees during one call. Its tokens are at `positions`, int64 [B, T], in the
    cache rows 0..B-1, or all in `row`, int64 [1]."""

    is_compileable = True  # so that the library never skips a mask because a call begins at position 0

    def __init__(
        self, positions: Tensor, layers: Sequence[LayerCache | Probe], row: Tensor | None = None
    ) -> None:
        self.positions = positions
        self.layers = layers
        self.row = row

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        own = layer.split.own(key, kv=True), layer.split.own(value, kv=True)
        return layer.write(*own, self.positions, self.row)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.layers[0].length, 0

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        """The positions themselves, for `visible`, where the library expects one offset."""
        return self.positions


def visible(
    *,
    q_offset: Tensor,
    kv_length: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> Tensor:
    """The mask function: bool [B, 1, T, S], whether a query attends to a cache entry.

    `mask_function(row, head, query, key)` is the model's rule, for indices that broadcast. Raises
    ValueError if the mask depends on more than positions.
    """
    if use_vmap or attention_mask is not None:
        raise ValueError("its attention mask depends on more than positions")
    batch, length = q_offset.shape
    device = q_offset.device
    mask = mask_function(
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.zeros(1, dtype=torch.int64, device=device).view(1, 1, 1, 1),
        q_offset.view(batch, 1, length, 1),
        torch.arange(kv_length, device=device).view(1, 1, 1, -1),
    )
    return mask.expand(batch, 1, length, kv_length)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, heads, T, h], cache [B, K, S, h] -> ([B, T, H, h], None).

    `softcap` bounds the scores to softcap * tanh(score / softcap). `s_aux` [H] are sinks: one score per
    head that takes part in the softmax and has no value. Raises ValueError for arguments that are not
    supported.
    """
    unknown = [name for name, x in others.items() if x is not None and name not in _IGNORED]
    if unknown:
        raise ValueError(f"its attention asks for {', '.join(unknown)}, which is not supported")
    split: Split = module.split  # type: ignore[assignment]
    query = split.own(query, kv=False)
    batch, _, length, _ = query.shape
    parts = []
    for run in split.heads.runs:
        keys = key[:, run.kv_start : run.kv_stop]
        values = value[:, run.kv_start : run.kv_stop]
        # As in CachedAttention: the query heads of a group become query rows of their KV head.
        count = run.kv_stop - run.kv_start
        group = (run.q_stop - run.q_start) // count
        rows = query[:, run.q_start : run.q_stop].reshape(batch, count, group * length, -1)
        mask = attention_mask.repeat(1, 1, group, 1)
        if softcap is None and s_aux is None:
            attended = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scaling)
        else:
            sinks = None
            if s_aux is not None:
                own = s_aux[run.q_start : run.q_stop].view(1, count, group, 1)
                sinks = own.expand(batch, count, group, length).reshape(batch, count, -1, 1)
            attended = _explicit(rows, keys, values, mask, scaling, softcap, sinks)
        parts.append(attended.reshape(batch, count * group, length, -1))
    return torch.cat(parts, dim=1).transpose(1, 2), None


def _explicit(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention in separate operators, for soft caps and sinks, which the fused operator does
    not support. `sinks` [B, k, rows, 1]."""
    scores = rows @ keys.transpose(2, 3) * (rows.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf")).float()
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return weights.to(values.dtype) @ values
