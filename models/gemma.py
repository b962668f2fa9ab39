"""The block of Gemma 2 and 3: norms before and after both attention and MLP."""

from __future__ import annotations

from torch import Tensor, nn

from comm import ops
from comm.group import Group
from models.attention import Attention, Step
from models.config import ModelConfig
from models.mlp import mlp_of
from models.norms import Norm, norm_of
from tp.shard import Layout


class Block(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))). The norm after attention or MLP needs
    the full sum over the ranks first, so the all-reduce is not fused with the residual and the norm."""

    def __init__(self, config: ModelConfig, layout: Layout, group: Group, layer: int) -> None:
        super().__init__()
        self.group = group
        self.norm = norm_of(config)
        self.attention = Attention(config, layout, layer)
        self.post_attention_norm = norm_of(config)
        self.pre_mlp_norm = norm_of(config)
        self.mlp = mlp_of(config, layout, layer)
        self.post_mlp_norm = norm_of(config)

    def forward(self, normed: Tensor, x: Tensor, following: Norm, step: Step) -> tuple[Tensor, Tensor]:
        """As `models.llama.Block.forward`."""
        attended = ops.all_reduce(self.attention(normed, step), self.group)
        x = step.chosen(x) + self.post_attention_norm(attended)
        x = x + self.post_mlp_norm(ops.all_reduce(self.mlp(self.pre_mlp_norm(x)), self.group))
        return following(x), x
