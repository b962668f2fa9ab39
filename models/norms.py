"""The families' normalizations over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the quotient in float32 (Zhang and Sennrich, 2019). `plus_one` (Gemma):
    the stored weight is less by 1, and is applied in float32, before rounding."""

    def __init__(self, dim: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.plus_one = plus_one
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        full = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (full * (1 + self.weight.float())).to(x.dtype)
        return full.to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation * weight + bias (Ba et al., 2016)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm


def norm_of(config: ModelConfig, size: int | None = None) -> Norm:
    """A norm of the config's kind over `size` numbers (None: the model width)."""
    size = config.dim if size is None else size
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps)
    return RMSNorm(size, config.norm_eps, config.norm == "rms1p")
