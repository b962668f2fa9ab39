"""Random quantized weights of any scheme: what tests of kernels and of models share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weights.quant import Factors, QuantWeight
from weights.schemes import Scheme

# Makes factors of a kind, of a shape [n, groups].
MakeFactor = Callable[[str, tuple[int, int], torch.Generator], Tensor]


def make_weight(scheme: Scheme, n: int, k: int, seed: int, make_factor: MakeFactor) -> QuantWeight:
    """A weight [n, k] with any codes that are numbers, and factors that `make_factor` makes. `k` is any
    multiple of the scheme's unit: super-groups may be incomplete."""
    generator = torch.Generator().manual_seed(seed)
    codes = scheme.code_name
    data = torch.randint(0, 1 << scheme.bits, (n, k), generator=generator, dtype=torch.uint8)
    if codes == "e4m3":
        data[data & 0x7F == 0x7F] = 0  # not numbers
    if codes == "i8":
        data = data.view(torch.int8)

    def factors(kind: str, size: int) -> Factors:
        size = size or k
        scale, offset = (make_factor(kind, (n, -(-k // size)), generator) for _ in range(2))
        return Factors(size, scale, None if scheme.symmetric else offset, kind)

    groups, supers = factors(scheme.scale_kind, scheme.group_size), None
    if scheme.super_scales:
        supers = factors(scheme.super_scales, scheme.super_size)
    return QuantWeight(data, codes, groups, supers)
