"""y = x W^T: ours where few rows make it a matter of reading the weights, torch's where it is not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import has_kernels

# Rows up to which reading W once, at the speed of memory, is all there is to do. Above, torch's
# products (oneDNN) are faster: they use the matrix units.
FEW_ROWS = 3


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., k] x [n, k] -> [..., n]. With bfloat16 on a CPU and few rows, products are of bfloat16
    pairs and sums in float32, rounded once."""
    rows = x.numel() // x.shape[-1]
    few = rows <= FEW_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    if few and has_kernels():
        return torch.ops.yoke_kernels.linear(x, weight, bias)
    return F.linear(x, weight, bias)
