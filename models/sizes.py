"""Which part of a model a rank holds, and how many parameters a model has: exact, and fast even with
thousands of experts.

The slow reference is `expected_shapes`, which lists every weight. Here, identical layers and the
experts of a layer are counted under the name of one of them. Free of torch.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from models.config import ModelConfig, expected_shapes
from tp.shard import Dims, Layout, plan_layout


def layout_of(config: ModelConfig, rank: int, world_size: int) -> Layout:
    """The part of a model that one rank holds. Raises InputError if there are too many ranks."""
    dims = Dims(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.ffn_dim,
        config.vocab_size,
        config.expert_dim,
    )
    return plan_layout(dims, rank, world_size)


@dataclass(frozen=True)
class WeightKind:
    """`count` weights of the same shape and the same sharding; `name` is the name of one of them."""

    name: str
    shape: tuple[int, ...]
    count: int


@cache
def weight_kinds(config: ModelConfig) -> tuple[WeightKind, ...]:
    """All weights of a model, by kind. Layers differ in shape only by having experts or not."""
    with_experts = sum(config.has_experts(layer) for layer in range(config.num_layers))
    # Two layers stand for all: layer 0 for layers without experts, layer 1 for layers with experts.
    two = replace(config, num_layers=2, dense_layers=(0,))
    times = {"0": config.num_layers - with_experts, "1": with_experts}
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for name, shape in expected_shapes(two).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        one = re.sub(r"\.experts\.\d+\.", ".experts.0.", name)
        counts[one, shape] += times[layer[1]] if layer else 1
    return tuple(WeightKind(name, shape, n) for (name, shape), n in counts.items() if n)


def num_parameters(config: ModelConfig) -> int:
    """The number of parameters of a model; a tied head is not counted again."""
    return sum(kind.count * prod(kind.shape) for kind in weight_kinds(config))


def num_active_parameters(config: ModelConfig) -> int:
    """The number of parameters that one token uses: all but those of experts that are not picked."""
    idle = sum(
        kind.count // config.num_experts * (config.num_experts - config.experts_per_token)
        * prod(kind.shape)
        for kind in weight_kinds(config)
        if ".experts." in kind.name
    )  # fmt: skip
    return num_parameters(config) - idle
