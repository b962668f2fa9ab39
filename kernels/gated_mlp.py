"""down(act(gate(x)) * up(x)) with packed weights, as one operator: the MLP of most model families.

What: the call of the operator, whether it can be called, and the slow reference in torch. One call
replaces three. In a prefill, the activations pass to the second matmul in the layout that it reads.

What is not here: a single linear (kernels.quant_linear); experts (models.mlp).
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

    `activation` is one of `ACTIVATIONS`. Gate, up and act(gate) * up are each rounded to bfloat16; the
    activation function has a relative error of up to 2^-17. `round_x` is as in `kernels.quant_linear`,
    for both matmuls.
    """
    return torch.ops.yoke_kernels.gated_mlp(
        x, gate_up.data, gate_up.numbers, gate_up_bias, down.data, down.numbers, down_bias, activation,
        round_x,
    )  # fmt: skip


def takes_gated_mlp(x: Tensor, activation: str) -> bool:
    """Whether `gated_mlp` can be called with `x` and `activation`."""
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
    """As `gated_mlp`, in plain torch, on any device: the slow reference."""
    gate, up = quant_linear_reference(x, gate_up, gate_up_bias).float().chunk(2, dim=-1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return quant_linear_reference((act * up).to(x.dtype), down, down_bias)
