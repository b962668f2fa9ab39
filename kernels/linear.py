"""y = x W^T: our operator for bfloat16 on a CPU, torch's linear for all else.

The operator checks the number of rows when it runs, not when it is traced, because one graph is
compiled for any number of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import has_kernels


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., k] x [n, k] -> [..., n]. With bfloat16 on a CPU, pairs of bfloat16 numbers are multiplied
    and summed in float32, rounded once. Where torch's matmul is faster for so many rows, it is used."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_kernels():
        return torch.ops.yoke_kernels.linear(x, weight, bias)
    return F.linear(x, weight, bias)
