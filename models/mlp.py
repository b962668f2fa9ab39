"""The MLPs of the families: plain, gated, and mixtures of experts.

Each returns this rank's partial sum of the result. A rank holds a slice of the MLP width, of every
expert too, so no rank waits for experts of another rank.

Shapes: N tokens, D model width, E experts, n experts per token, W MLP width of this rank (of an expert,
where there are experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated_mlp import gated_mlp, takes_gated_mlp
from kernels.packed import pack_parts
from kernels.quant_cuda import CudaPacked, pack_cuda, quant_linear_cuda
from kernels.quant_linear import Packed, parts_of, quant_linear
from models.config import ModelConfig
from tp.layers import ColumnLinear, Packing, RowLinear, packed_of
from tp.shard import Layout
from weights.quant import QuantWeight


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}


def mlp_of(config: ModelConfig, layout: Layout, layer: int) -> nn.Module:
    """The MLP module of a layer: experts, gated or plain."""
    if config.has_experts(layer):
        return Experts(config, layout)
    return GatedMLP(config, layout) if config.gated else MLP(config, layout)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, GLU variants, 2020)."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        width = layout.ffn_stop - layout.ffn_start
        self.activation = config.activation
        self.gate_up = ColumnLinear(config.dim, (width, width), config.mlp_bias)
        self.down = RowLinear(width, config.dim, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        ups, downs = packed_of(self.gate_up), packed_of(self.down)
        if ups is not None and downs is not None and takes_gated_mlp(x, self.activation):
            rounds = self.gate_up.packing is not None and self.gate_up.packing.round_x
            biases = self.gate_up.bias, self.down.bias
            return gated_mlp(x, ups, downs, self.activation, *biases, rounds)
        gate, up = self.gate_up.split(x)
        return self.down(ACTIVATIONS[self.activation](gate) * up)


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        width = layout.ffn_stop - layout.ffn_start
        self.act = ACTIVATIONS[config.activation]
        self.up = ColumnLinear(config.dim, (width,), config.mlp_bias)
        self.down = RowLinear(width, config.dim, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class ExpertStack(nn.Module):
    """One weight of all experts: plain [E, out, in], or quantized, each expert packed separately."""

    def __init__(self, num_experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.packing: Packing | None = None
        shape = (num_experts, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)

    def hold_quantized(
        self,
        experts: Iterable[Sequence[QuantWeight | Tensor]],
        device: torch.device | str = "cpu",
        round_prompts: bool = False,
    ) -> None:
        """Replace the plain weight by this rank's shard of each expert's parts. `experts` is consumed
        one by one; all must have the same schemes. The rest is as in `tp.layers.hold_quantized`."""
        first: Packed | CudaPacked | None = None
        tensors: dict[str, Tensor] = {}
        for index, weights in enumerate(experts):
            packed = _pack_on(weights, device)
            held = {
                name: each
                for name in ("data", "scale", "offset")
                if (each := getattr(packed, name, None)) is not None
            }
            if first is None:
                first = packed
                for name, each in held.items():
                    tensors[name] = each.new_empty((self.num_experts, *each.shape))
            assert packed[-1] == first[-1] and held.keys() == tensors.keys(), packed[-1]
            for name, each in held.items():
                tensors[name][index] = each
        assert first is not None and index + 1 == self.num_experts
        self.weight = None  # type: ignore[assignment]
        if isinstance(first, Packed):
            self.packing = Packing(first.parts, round_prompts)
        else:
            self.packing = Packing((), round_prompts, first.form)
        for name, each in tensors.items():
            self.register_buffer(f"packed_{name}", each, persistent=False)

    def operands(self) -> tuple[list[Tensor], list[int]]:
        """The arguments of `run_experts` for this weight: (its tensors, []) if plain, or (its packed
        tensors, the numbers of its `Packing`: `round_x`, and those of its parts)."""
        if self.packing is None:
            return [self.weight], []
        tensors = [self._buffers.get(f"packed_{name}") for name in ("data", "scale", "offset")]
        numbers = [number for part in self.packing.parts for number in part]
        form = [int(self.packing.round_x), *self.packing.form, *numbers]
        return [each for each in tensors if each is not None], form


def _pack_on(
    weights: Sequence[QuantWeight | Tensor], device: torch.device | str
) -> Packed | CudaPacked:
    if torch.device(device).type == "cuda":
        (weight,) = weights
        assert isinstance(weight, QuantWeight)
        return pack_cuda(weight.with_rows(lambda each: each.to(device)))
    return pack_parts(weights)


class Experts(nn.Module):
    """A mixture of experts: a router, held by all ranks, picks a few gated MLPs per token (Mixtral,
    2024).

    The result is the sum of the picked experts' results, weighted by the router's probabilities. With
    `norm_topk` these weights are scaled to sum to 1.
    """

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        width = layout.expert_stop - layout.expert_start
        self.count = config.experts_per_token
        self.norm_topk = config.norm_topk
        self.activation = config.activation
        self.router = ColumnLinear(config.dim, (config.num_experts,))
        self.gate_ups = ExpertStack(config.num_experts, 2 * width, config.dim)
        self.downs = ExpertStack(config.num_experts, config.dim, width)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of each token's experts, [N, n] in x's dtype, and the experts, int64 [N, n]."""
        probabilities = torch.softmax(self.router(x).float(), dim=-1)
        weights, experts = torch.topk(probabilities, self.count, dim=-1)
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        gate_up, up_form = self.gate_ups.operands()
        down, down_form = self.downs.operands()
        return run_experts(x, weights, experts, gate_up, up_form, down, down_form, self.activation)


@torch.library.custom_op("yoke_models::run_experts", mutates_args=(), device_types="cpu")
def run_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: list[Tensor],
    up_form: list[int],
    down: list[Tensor],
    down_form: list[int],
    activation: str,
) -> Tensor:
    """The weighted sum of each token's picked experts: [N, D] -> [N, D].

    x [N, D]; weights [N, n] and experts int64 [N, n] from the router; gate_up [E, 2 W, D] and down
    [E, D, W], as `ExpertStack.operands` returns them. This is one operator because the experts are
    known only at run time: it reads only the weights of those picked, in place.
    """
    result = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        tokens, place = (experts == expert).nonzero(as_tuple=True)
        part = _expert(x[tokens], expert, gate_up, up_form, down, down_form, activation)
        result.index_add_(0, tokens, part * weights[tokens, place].unsqueeze(1))
    return result


@run_experts.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: list[Tensor],
    up_form: list[int],
    down: list[Tensor],
    down_form: list[int],
    activation: str,
) -> Tensor:
    return torch.empty_like(x)


@run_experts.register_kernel("cuda")
def run_experts_dense(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: list[Tensor],
    up_form: list[int],
    down: list[Tensor],
    down_form: list[int],
    activation: str,
) -> Tensor:
    """As `run_experts`, but with every expert for every token and no branch on values: the slow
    reference, and the form that a CUDA graph can capture."""
    share = torch.zeros(x.shape[0], gate_up[0].shape[0], dtype=x.dtype, device=x.device)
    share.scatter_(1, experts, weights)
    if up_form or down_form:
        result = torch.zeros_like(x)
        for expert in range(share.shape[1]):
            part = _expert(x, expert, gate_up, up_form, down, down_form, activation)
            result += part * share[:, expert : expert + 1]
        return result
    gate, up = torch.einsum("nd,ewd->new", x, gate_up[0]).chunk(2, dim=-1)
    hidden = ACTIVATIONS[activation](gate) * up
    return torch.einsum("new,edw,ne->nd", hidden, down[0], share)


def _expert(
    x: Tensor,
    expert: int,
    gate_up: list[Tensor],
    up_form: list[int],
    down: list[Tensor],
    down_form: list[int],
    activation: str,
) -> Tensor:
    """One expert's MLP: [M, D] -> [M, D]."""
    gate, up = _matmul(x, expert, gate_up, up_form).chunk(2, dim=-1)
    return _matmul(ACTIVATIONS[activation](gate) * up, expert, down, down_form)


def _matmul(x: Tensor, expert: int, held: list[Tensor], form: list[int]) -> Tensor:
    if not form:
        return F.linear(x, held[0][expert])
    tensors = [each[expert] for each in held]
    if x.is_cuda:
        offset = tensors[2] if len(tensors) > 2 else None
        return quant_linear_cuda(x, CudaPacked(tensors[0], tensors[1], offset, tuple(form[1:])))
    return quant_linear(x, Packed(tensors[0], parts_of(form[1:])), None, bool(form[0]))
