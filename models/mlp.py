"""The MLPs of the families: plain, gated, and many of them behind a router.

All return this rank's part of the result: each holds a slice of the width, of every expert too, so that
no rank waits for tokens that another rank's experts have. Shapes as in `models.attention`; E experts,
W width of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from tp.layers import ColumnLinear, RowLinear
from tp.shard import Layout


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}


def mlp_of(config: ModelConfig, layout: Layout, layer: int) -> nn.Module:
    """The MLP of a layer."""
    if config.has_experts(layer):
        return Experts(config, layout)
    return GatedMLP(config, layout) if config.gated else MLP(config, layout)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, GLU variants, 2020)."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        width = layout.ffn_stop - layout.ffn_start
        self.act = ACTIVATIONS[config.activation]
        self.gate_up = ColumnLinear(config.dim, (width, width), config.mlp_bias)
        self.down = RowLinear(width, config.dim, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.split(x)
        return self.down(self.act(gate) * up)


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        width = layout.ffn_stop - layout.ffn_start
        self.act = ACTIVATIONS[config.activation]
        self.up = ColumnLinear(config.dim, (width,), config.mlp_bias)
        self.down = RowLinear(width, config.dim, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Experts(nn.Module):
    """A few gated MLPs of many, chosen per token by a router that all ranks hold (Mixtral, 2024).

    The chosen experts' results are added up with the router's probabilities, made to add up to one
    where the model wants that (`norm_topk`).
    """

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        width = layout.expert_stop - layout.expert_start
        self.count = config.experts_per_token
        self.norm_topk = config.norm_topk
        self.activation = config.activation
        self.router = ColumnLinear(config.dim, (config.num_experts,))
        shape = (config.num_experts, 2 * width, config.dim)
        self.gate_up = nn.Parameter(torch.empty(shape), requires_grad=False)
        shape = (config.num_experts, config.dim, width)
        self.down = nn.Parameter(torch.empty(shape), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        probabilities = torch.softmax(self.router(x).float(), dim=-1)
        weights, experts = torch.topk(probabilities, self.count, dim=-1)  # [N, n]
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        own = weights.to(x.dtype)
        return run_experts(x, own, experts, self.gate_up, self.down, self.activation)


@torch.library.custom_op("yoke_models::run_experts", mutates_args=(), device_types="cpu")
def run_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """Each token's chosen experts, weighted and added up: [N, D] -> [N, D].

    x [N, D]; weights [N, n] and experts int64 [N, n] of the router; gate_up [E, 2 W, D]; down
    [E, D, W]. One operator, because which experts are needed is known only as it runs: it reads the
    weights of those alone, where they lie.
    """
    act = ACTIVATIONS[activation]
    result = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        tokens, place = (experts == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[tokens], gate_up[expert]).chunk(2, dim=-1)
        part = F.linear(act(gate) * up, down[expert]) * weights[tokens, place].unsqueeze(1)
        result.index_add_(0, tokens, part)
    return result


@run_experts.register_fake
def _(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    return torch.empty_like(x)


@run_experts.register_kernel("cuda")
def run_experts_dense(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """The same with every expert for every token, and no look at the values: the slow reference, and
    what a CUDA graph can hold."""
    share = torch.zeros(x.shape[0], gate_up.shape[0], dtype=x.dtype, device=x.device)
    share.scatter_(1, experts, weights)
    gate, up = torch.einsum("nd,ewd->new", x, gate_up).chunk(2, dim=-1)
    hidden = ACTIVATIONS[activation](gate) * up
    return torch.einsum("new,edw,ne->nd", hidden, down, share)
