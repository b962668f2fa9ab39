"""The block of GPT-J and Falcon: attention and MLP side by side, so a layer needs one all-reduce.

Source: Wang and Komatsuzaki, GPT-J-6B (2021); Almazrouei et al., Falcon (2023).
"""

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
    """x + attention(norm(x)) + mlp(norm(x)): one all-reduce sums both over the ranks. In the larger
    Falcons the MLP has its own norm."""

    def __init__(self, config: ModelConfig, layout: Layout, group: Group, layer: int) -> None:
        super().__init__()
        self.group = group
        self.norm = norm_of(config)
        self.mlp_norm = norm_of(config) if config.two_norms else None
        self.attention = Attention(config, layout, layer)
        self.mlp = mlp_of(config, layout, layer)

    def forward(self, normed: Tensor, x: Tensor, following: Norm, step: Step) -> tuple[Tensor, Tensor]:
        """As `models.llama.Block.forward`."""
        other = normed if self.mlp_norm is None else self.mlp_norm(x)
        part = self.attention(normed, step) + self.mlp(step.chosen(other))
        x = step.chosen(x) + ops.all_reduce(part, self.group)
        return following(x), x
