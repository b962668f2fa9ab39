"""A weight to fewer bits, each number to the nearest that its group's scale allows.

What is not here: ways that look at what the weight is multiplied with, or that search for better scales
(quantize/), and products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weights.errors import InputError
from weights.quant import QuantWeight, Scheme, pack_nibbles

TINY = 2.0**-24  # the smallest float16 above 0: the scale of a group of zeros


def quantise_rtn(weight: Tensor, scheme: Scheme) -> QuantWeight:
    """Round a weight [n, k] of any float dtype to the nearest numbers of a scheme.

    8 bits: float32 scale amax / 127 for a row. 4 bits: float16 scale of a group, rounded before the
    integers are taken, so that these are the nearest of what will be read. Symmetric: the number that
    is largest by magnitude becomes -8, so the scale has its sign turned; this uses all 16 levels, as
    Q4_0 of ggml does. Otherwise: 0..15 over the range of the group, 0 among it; the offset is float32
    -z * scale with an integer z, which a float16 cannot hold exactly: 11 bits times 4.

    Raises InputError where numbers are not finite or too large, and where the group does not divide k.
    """
    n, k = weight.shape
    group = scheme.group_size or k
    if k % group:
        raise InputError(f"a weight of {k} columns cannot be divided into groups of {group}")
    groups = weight.float().reshape(n, -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    if not (low.isfinite() & high.isfinite()).all():
        raise InputError("it holds numbers that are not finite")
    if scheme.bits == 8:
        scale = torch.maximum(high, -low) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        q = (groups / scale.unsqueeze(-1)).round().clamp(-127, 127)
        return QuantWeight(q.to(torch.int8).view(n, k), scale, None, 8, group)
    if scheme.symmetric:
        scale = torch.where(high > -low, high, low) / -8
        zero = torch.full_like(scale, 8)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / 15
    half = scale.half()
    if half.isinf().any():
        raise InputError(f"it holds numbers up to {float(weight.abs().max()):g}, too large for 4 bits")
    half = torch.where(half == 0, TINY, half.float()).half()
    scale = half.float()
    if not scheme.symmetric:
        zero = (-low / scale).round().clamp(0, 15)
    q = (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    offset = None if scheme.symmetric else -zero * scale
    return QuantWeight(pack_nibbles(q.to(torch.uint8).view(n, k)), half, offset, 4, group)
