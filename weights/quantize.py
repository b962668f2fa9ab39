"""Round weights to the nearest integers of a scheme (RTN): fast, and without a calibration text.

Scales are rounded to their stored dtype first; then the integers nearest for these rounded scales are
taken. A rank quantizes whole rows or whole groups and selects its columns afterwards, so no number
depends on the number of ranks.

What is not here: choosing integers by their effect on activations (quantize/).
"""

from __future__ import annotations

import torch
from torch import Tensor

from base.errors import InputError
from weights.quant import QuantWeight, integer_weight
from weights.schemes import Scheme

BLOCK = 1 << 16  # numbers that are rounded at a time: intermediate results stay in the caches
_LARGEST = 65504.0  # of float16; a weight is nowhere near
TINY = 2.0**-24  # the smallest float16 above 0


def quantize_rtn(weight: Tensor, scheme: Scheme) -> QuantWeight:
    """Round `weight` [n, k], of any float dtype, to the nearest integers.

    8 bits: -127..127, symmetric. 4 bits, symmetric: the number with the largest magnitude becomes -8,
    so that all 16 integers are used; the scale has the opposite sign of that number (as in ggml's
    Q4_0). 4 bits, asymmetric: the range, extended to include 0, has 15 steps, and 0 is the integer z;
    the offset is -z * scale, rounded to float16 (GPTQ, AWQ and compressed-tensors store z, the zero
    point). Scales are float16 for groups, float32 for rows. Raises InputError for numbers that are not
    finite or too large for such scales; ValueError if k is not a multiple of the group size.
    """
    n, k = weight.shape
    size = scheme.group_size or k
    if k % size:
        raise ValueError(f"rows of {k} are not whole groups of {size}")
    groups = k // size
    fine = torch.float16 if scheme.group_size else torch.float32
    codes = torch.int8 if scheme.bits == 8 else torch.uint8
    data = torch.empty(n, k, dtype=codes, device=weight.device)
    scale = torch.empty(n, groups, dtype=fine, device=weight.device)
    offset = None if scheme.symmetric else torch.empty_like(scale)
    rows = max(1, BLOCK // max(k, 1))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        values = weight[part].float().view(-1, groups, size)
        q, scale[part], low = _round(values, scheme, fine)
        if offset is not None:
            offset[part] = low
        data[part] = q.view(-1, k).to(codes)
    return integer_weight(data, scale, offset, scheme.bits, size)


def _round(values: Tensor, scheme: Scheme, fine: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The integers [n, groups, size] as floats, and the scales and offsets [n, groups], of float32
    `values` [n, groups, size]. The offsets have no meaning for a symmetric scheme."""
    low, high = values.amin(-1), values.amax(-1)  # aminmax of short groups takes four times as long
    if scheme.symmetric:
        if scheme.bits == 8:
            scale = torch.maximum(-low, high) / 127
        else:
            scale = torch.where(high > -low, high, low) / -8
    else:
        assert scheme.bits == 4
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / 15
    # The negated comparison also catches NaN. In float16, the offset of up to 15 scales must fit too.
    if not float(scale.abs().max()) <= (_LARGEST / 15 if fine == torch.float16 else _LARGEST):
        raise InputError(
            "numbers that are infinite, not a number or beyond any weight's size cannot be "
            f"quantized to {scheme.name}: the file may be damaged: download it again, or use quant=none"
        )
    scale = scale.to(fine)
    scale = torch.where(scale.abs() < TINY, TINY, scale).to(fine)  # groups of zeros stay zeros
    used = scale.float()
    inverse = (1 / used).unsqueeze(-1)
    q = values * inverse
    if scheme.bits == 8:
        return q.round_().clamp_(-127, 127), scale, scale
    if scheme.symmetric:
        return q.round_().add_(8).clamp_(0, 15), scale, scale
    zero = (-low.unsqueeze(-1) * inverse).round_().clamp_(0, 15)
    q = q.round_().add_(zero).clamp_(0, 15)
    return q, scale, (-zero.squeeze(-1) * used).to(fine)
