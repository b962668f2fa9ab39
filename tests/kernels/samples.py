"""Tensors of the kernels' tests: random ones, and what a cache holds as numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def numbers(cached: Tensor, scales: Tensor | None) -> Tensor:
    """Of a cache of any dtype, in float64."""
    return cached.double() if scales is None else cached.double() * scales.double().unsqueeze(-1)
