"""down(act(gate(x)) * up(x)) with packed weights, as one operator: the MLP of most families.

What: the operator's call, when it can be had, and the slow reference in torch. One call in place of
three; and a prompt's activations go from one product to the next in the form that it takes them.

What is not here: the products by themselves (kernels.quant_linear); experts (models.mlp).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.load import has_kernels
from kernels.quant_linear import Packed, quant_linear_reference

ACTIVATIONS = ("silu", "gelu_tanh")


def gated_mlp(
    x: Tensor,
    gate_up: Packed,
    down: Packed,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    round_x: bool = False,
) -> Tensor:
    """bfloat16 [..., k] x [2 W, k] -> [..., W] x [n, W] -> [..., n] on a CPU, with our kernels.

    `activation` is one of `ACTIVATIONS`. Gate and up are rounded to bfloat16, and so is their product;
    activations are to within 2^-17 of themselves. `round_x` as in `kernels.quant_linear`, for both.
    """
    return torch.ops.yoke_kernels.gated_mlp(
        x, *gate_up, gate_up_bias, *down, down_bias, activation, round_x
    )


def takes_gated_mlp(x: Tensor, activation: str) -> bool:
    """Whether `gated_mlp` can be called."""
    on_cpu = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return on_cpu and activation in ACTIVATIONS and has_kernels()


def gated_mlp_reference(
    x: Tensor,
    gate_up: Packed,
    down: Packed,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The same, slowly."""
    gate, up = quant_linear_reference(x, gate_up, gate_up_bias).float().chunk(2, dim=-1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return quant_linear_reference((act * up).to(x.dtype), down, down_bias)
