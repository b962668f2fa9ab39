"""Rotary position embeddings, real-valued: the tables of cos and sin.

Families differ in which numbers of a head are rotated at which frequency, and in how the frequencies
are scaled for contexts longer than in training; `models.config.Rope` holds these settings.

Sources: Su et al., RoFormer (2021); "linear": Chen et al., Position Interpolation (2023); "dynamic":
NTK-aware scaling (bloc97 and emozilla, 2023); "yarn": Peng et al. (2023); "longrope": Ding et al.
(2024); "llama3": the reference code of Llama 3.1 (2024).

What is not here: the rotation (`kernels.attention`, in torch `kernels.rotary`); frequencies that change
while a sequence grows. Kinds that depend on the length use the length of the cache, so that all keys in
the cache are rotated with the same frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.config import Rope


def rope_tables(rope: Rope, head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, times `attention_factor`: two float32 [length, rotary dim /
    2]."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(rope, head_dim, length))
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def frequencies(rope: Rope, head_dim: int, length: int) -> Tensor:
    """Radians per position: float32 [rotary dim / 2]. `length`: the cache length of the run."""
    dim = rope.dim or head_dim
    theta, original = rope.theta, rope.original_max_seq_len
    if rope.kind == "dynamic" and length > original:
        theta *= (rope.factor * length / original - (rope.factor - 1)) ** (dim / max(dim - 2, 1))
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    match rope.kind:
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain)
        case "longrope":
            return plain / torch.tensor(rope.long_factors if length > original else rope.short_factors)
    return plain


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Low frequencies are divided by the factor, high ones kept, those between are blended."""
    rotations = (
        rope.original_max_seq_len * plain / (2 * math.pi)
    )  # full rotations within the trained length
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    """As `_llama3`, with a blend that is linear in the index of the frequency."""
    dim = 2 * len(plain)

    def index(rotations: float) -> float:
        """The index of the frequency that makes `turns` full rotations within the trained length."""
        ratio = rope.original_max_seq_len / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    first, last = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    span = last - first or 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - first) / span).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)
