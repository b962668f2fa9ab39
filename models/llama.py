"""The Llama block: attention, then the MLP, each with a norm before it.

Also the block of Mistral, Qwen 2 and 3, SmolLM 2 and 3, Phi 3 and 4, Granite, and, with experts as the
MLP, of Mixtral and Qwen 3 MoE. Their differences are flags of the config.
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
    """x + attention(norm(x)), then x + mlp(norm(x)). Each ends with one collective that sums over the
    ranks, adds the residual x and applies the next norm."""

    def __init__(self, config: ModelConfig, layout: Layout, group: Group, layer: int) -> None:
        super().__init__()
        self.group = group
        self.scale = config.residual_scale
        self.norm = norm_of(config)
        self.attention = Attention(config, layout, layer)
        self.mlp_norm = norm_of(config)
        self.mlp = mlp_of(config, layout, layer)

    def forward(self, normed: Tensor, x: Tensor, following: Norm, step: Step) -> tuple[Tensor, Tensor]:
        """x [N, D], normed = norm(x) -> (following(x'), x'), both [M, D]; x' is x after this block."""
        part = self._scaled(self.attention(normed, step))
        norm = self.mlp_norm
        normed, x = ops.all_reduce_add_rms_norm(part, step.chosen(x), norm.weight, norm.eps, self.group)
        part = self._scaled(self.mlp(normed))
        return ops.all_reduce_add_rms_norm(part, x, following.weight, following.eps, self.group)

    def _scaled(self, part: Tensor) -> Tensor:
        return part if self.scale == 1 else part * self.scale
