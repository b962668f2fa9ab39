"""Which weights of a model are quantised, by what scheme, and whether ranks can share them. Free of
torch, so that a job is refused before a rank exists.

The linear layers of attention and MLP have the scheme that is asked for; the head has int8 whatever
that is, since its errors are those of the logits. The embedding is looked up and stays as it is. Norms,
routers and experts are never quantised here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

from models.config import HEAD, ModelConfig
from models.sizes import layout_of, weight_kinds
from tp.shard import Layout, slices_of
from weights.errors import InputError
from weights.schemes import MIN_GROUP, SCHEMES, Scheme

EMBEDDING = "model.embed_tokens.weight"
HEAD_SCHEME = Scheme(8, 0)
_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")
_MOST_RANKS = 64  # of which a message says that they would do

SchemeOf = Callable[[str], Scheme | None]


def is_linear(name: str) -> bool:
    """Whether a weight is multiplied in every token's attention or MLP."""
    return _LINEAR.fullmatch(name) is not None


def scheme_for(name: str, asked: Scheme) -> Scheme | None:
    """What a weight is quantised to where `asked` is."""
    return HEAD_SCHEME if name == HEAD else asked if is_linear(name) else None


def can_cut(config: ModelConfig, name: str, shape: tuple[int, ...], scheme: Scheme, size: int) -> bool:
    """Whether each of `size` ranks can hold its columns of a weight quantised by `scheme`."""
    return all(
        scheme.group_within(columns.start, columns.stop)
        for rank in range(size)
        for columns in [slices_of(name, shape, layout_of(config, rank, size))[1]]
    )


def check_quant(config: ModelConfig, asked: Scheme, world_size: int) -> None:
    """Raise InputError if a model cannot be quantised so over so many ranks."""
    if config.num_experts:
        raise InputError(
            f"quant={asked.name}: experts are not quantised, and this model has {config.num_experts}; "
            "use quant=auto or none"
        )
    kinds = [(kind.name, kind.shape) for kind in weight_kinds(config) if is_linear(kind.name)]
    kinds.append((HEAD, (config.vocab_size, config.dim)))
    for name, shape in kinds:
        scheme = scheme_for(name, asked)
        assert scheme is not None
        if shape[1] % (scheme.group_size or MIN_GROUP):
            fitting = ", ".join(s for s in SCHEMES if shape[1] % _group(s) == 0)
            raise InputError(
                f"quant={asked.name}: {name} has rows of {shape[1]}, which are not whole groups of "
                f"{scheme.group_size or MIN_GROUP}; use "
                + (f"one of {fitting}" if fitting else "quant=none")
            )

    def fits(size: int) -> bool:
        schemes = [(name, shape, scheme_for(name, asked)) for name, shape in kinds]
        return all(
            s is not None and can_cut(config, name, shape, s, size) for name, shape, s in schemes
        )

    if not fits(world_size):
        others = [n for n in range(1, min(config.num_heads, _MOST_RANKS) + 1) if n != world_size]
        fitting = ", ".join(str(n) for n in others if fits(n))
        raise InputError(
            f"quant={asked.name}: with {world_size} ranks some hold columns that are not whole groups "
            f"of {MIN_GROUP}; use --ranks N with N of {fitting}, or quant=none"
        )


def _group(name: str) -> int:
    found = re.search(r"-g(\d+)", name)
    return int(found[1]) if found else MIN_GROUP


def weight_bytes(config: ModelConfig, layout: Layout, item: int, scheme_of: SchemeOf) -> int:
    """What one rank's weights take: `item` bytes a number where there is no scheme. A tied head that
    has a scheme is a copy of its own."""
    total = 0
    for kind in weight_kinds(config):
        sizes = [part.stop - part.start for part in slices_of(kind.name, kind.shape, layout)]
        scheme = scheme_of(kind.name)
        if scheme is None or len(sizes) != 2:
            total += kind.count * prod(sizes) * item
        else:
            total += kind.count * scheme.nbytes(sizes[0], sizes[1])
    head = scheme_of(HEAD)
    if config.tie_embeddings and head is not None:
        total += head.nbytes(layout.vocab_block, config.dim)
    return total
