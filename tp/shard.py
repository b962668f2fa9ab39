"""The sharding table: which part of each weight a rank holds.

`TABLE` maps canonical weight names to a `ShardSpec`. The loader reads slices by it, and the layers take
their sizes from the same functions, so the two cannot disagree.

What is not here: how heads are split (`tp.heads`), and reading the slices (`weights`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from base.errors import InputError
from tp.heads import Heads, split_heads

if TYPE_CHECKING:  # this table is also used where torch is not imported
    from weights.checkpoint import Slices

# MLP widths are cut at multiples of this where possible: one block of the common GGUF formats, and a
# whole number of vector registers.
FFN_UNIT = 32


@dataclass(frozen=True)
class ShardSpec:
    """How one weight is sharded: dimension `dim` along `axis`, or replicated if `dim` is None.

    Axes: "q" and "kv" (heads), "ffn" (MLP width), "expert" (each expert's width), "vocab". `axis`
    "first" without a `dim`: whole on rank 0 and zero on the others, for the bias of a row-parallel
    linear, whose results are summed over the ranks.
    """

    dim: int | None = None
    axis: str = ""


TABLE: tuple[tuple[str, ShardSpec], ...] = (
    (r"model\.embed_tokens\.weight", ShardSpec(0, "vocab")),
    (r"lm_head\.weight", ShardSpec(0, "vocab")),
    (r"lm_head\.bias", ShardSpec(0, "vocab")),
    (r"model\.layers\.\d+\.self_attn\.q_proj\.(weight|bias)", ShardSpec(0, "q")),
    (r"model\.layers\.\d+\.self_attn\.[kv]_proj\.(weight|bias)", ShardSpec(0, "kv")),
    (r"model\.layers\.\d+\.self_attn\.o_proj\.weight", ShardSpec(1, "q")),
    (r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight", ShardSpec()),
    (r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.(weight|bias)", ShardSpec(0, "ffn")),
    (r"model\.layers\.\d+\.mlp\.down_proj\.weight", ShardSpec(1, "ffn")),
    (r"model\.layers\.\d+\.(self_attn\.o|mlp\.down)_proj\.bias", ShardSpec(None, "first")),
    (r"model\.layers\.\d+\.mlp\.gate\.weight", ShardSpec()),
    (r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj\.weight", ShardSpec(0, "expert")),
    (r"model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj\.weight", ShardSpec(1, "expert")),
    (r"model\.(norm|layers\.\d+\.\w+_layernorm)\.(weight|bias)", ShardSpec()),
)


@dataclass(frozen=True)
class Dims:
    """The sizes of a model that decide how it is sharded."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int  # 0 where all layers have experts
    vocab_size: int
    expert_dim: int = 0


@dataclass(frozen=True)
class Layout:
    """What a rank holds of each axis, in elements: `heads`, `[ffn_start, ffn_stop)`,
    `[expert_start, expert_stop)` and `[vocab_start, vocab_stop)`. `vocab_block` is the allocated size,
    the same on all ranks; the last ranks may fill it in part or not at all."""

    head_dim: int
    heads: Heads
    ffn_start: int
    ffn_stop: int
    vocab_start: int
    vocab_stop: int
    vocab_block: int
    expert_start: int = 0
    expert_stop: int = 0


def plan_layout(dims: Dims, rank: int, world_size: int, ffn_unit: int = FFN_UNIT) -> Layout:
    """The layout of one rank, with MLP borders at multiples of `ffn_unit` elements. Raises InputError
    if a rank would get no query head or no MLP column."""
    heads = split_heads(dims.num_heads, dims.num_kv_heads, rank, world_size)
    ffn, expert = (
        split_units(size, ffn_unit, rank, world_size) if size else (0, 0)
        for size in (dims.ffn_dim, dims.expert_dim)
    )
    block = -(-dims.vocab_size // world_size)
    start = min(rank * block, dims.vocab_size)
    stop = min(start + block, dims.vocab_size)
    return Layout(dims.head_dim, heads, *ffn, start, stop, block, *expert)


def split_units(size: int, unit: int, rank: int, world_size: int) -> tuple[int, int]:
    """`[start, stop)` of a rank's contiguous part of `size` elements, as even as whole units allow.

    Units are single elements if `size` is not a multiple of `unit`, or has fewer units than ranks.
    Raises InputError if there are fewer elements than ranks.
    """
    if size < world_size:
        raise InputError(f"{world_size} ranks cannot share an MLP width of {size}; use fewer ranks")
    if size % unit or size // unit < world_size:
        unit = 1
    count = size // unit
    return count * rank // world_size * unit, count * (rank + 1) // world_size * unit


def find_spec(name: str) -> ShardSpec:
    """The table's `ShardSpec` for a canonical name. Raises InputError if the table has none."""
    for pattern, spec in TABLE:
        if re.fullmatch(pattern, name):
            return spec
    raise InputError(f"the weight {name!r} is not in the sharding table; this model is not supported")


def slices_of(name: str, shape: tuple[int, ...], layout: Layout) -> Slices:
    """The slices of the weight `name` (of full `shape`) that the rank of `layout` holds. Raises
    InputError if the table has no such weight."""
    spec = find_spec(name)
    slices = [slice(0, size) for size in shape]
    if spec.dim is not None:
        slices[spec.dim] = slice(*_bounds(spec.axis, layout))
    return tuple(slices)


def _bounds(axis: str, layout: Layout) -> tuple[int, int]:
    heads, head_dim = layout.heads, layout.head_dim
    match axis:
        case "q":
            return heads.q_start * head_dim, heads.q_stop * head_dim
        case "kv":
            return heads.kv_start * head_dim, heads.kv_stop * head_dim
        case "ffn":
            return layout.ffn_start, layout.ffn_stop
        case "expert":
            return layout.expert_start, layout.expert_stop
        case "vocab":
            return layout.vocab_start, layout.vocab_stop
    raise AssertionError(axis)
