"""y = x W^T: ours for bfloat16 on a CPU, torch's for all else.

How many rows there are is for the operator to see as it runs: a graph compiled for any number of tokens
must not ask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import has_kernels


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., k] x [n, k] -> [..., n]. With bfloat16 on a CPU, products are of bfloat16 pairs and sums in
    float32, rounded once; where torch's product of so many rows is the faster one, it is taken."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_kernels():
        return torch.ops.yoke_kernels.linear(x, weight, bias)
    return F.linear(x, weight, bias)
