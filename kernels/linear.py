"""y = x W^T: ours where few rows make it a matter of reading the weights, torch's where it is not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import load_kernels


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def few_rows() -> int:
    """Rows up to which reading W once, at the speed of memory, is all there is to do: 3, or 32 with
    matrix units (AMX). Above, torch's products (oneDNN) are faster. A constant of compiled code."""
    return int(torch.ops.yoke_kernels.few_rows()) if load_kernels() else 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., k] x [n, k] -> [..., n]. With bfloat16 on a CPU and few rows, products are of bfloat16
    pairs and sums in float32, rounded once."""
    own = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    if own and x.numel() <= few_rows() * x.shape[-1]:
        return torch.ops.yoke_kernels.linear(x, weight, bias)
    return F.linear(x, weight, bias)
