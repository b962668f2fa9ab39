"""Rotary position embeddings (Su et al., RoFormer, 2021) in torch: the rotation, for any device.

It is the slow reference for what the operator of `kernels.attention` does to queries and keys.

What is not here: the angle of each number at each position (`models.rope`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """cos and sin, float32 [S, r / 2], for positions 0..S-1 and the frequencies of a head's first r
    numbers. Number i is rotated with number i + r / 2; if `interleaved`, number 2 i with 2 i + 1."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first r numbers of each head: x [..., heads, h] -> the same shape and dtype; cos and
    sin [..., r / 2]. Computed in float32 and rounded once."""
    size = 2 * cos.shape[-1]
    rotated, kept = x[..., :size].float(), x[..., size:]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        rotated = pairs.flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    rotated = rotated.to(x.dtype)
    return rotated if size == x.shape[-1] else torch.cat((rotated, kept), dim=-1)
