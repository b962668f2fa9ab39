"""How important the columns of each weight are: the mean square of their inputs over a text.

An error in column j of a weight adds the error times input j to the output. So the mean square of that
input weights the column's squared error (llama.cpp calls these numbers the importance matrix, imatrix).
The inputs are those of the model as it is, before it is quantized.

What is not here: products of different inputs, which GPTQ uses (quantize.gptq).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import HEAD
from models.load import PARTS, destinations
from models.mlp import ACTIVATIONS, Experts
from quantize.calibrate import LINEARS
from quantize.walk import Walk, whole


@dataclass
class _Sum:
    """The sum of squares of inputs, float64 [k], and their count."""

    total: Tensor | float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        self.total = self.total + flat.square().sum(0, dtype=torch.float64)
        self.count += len(flat)


@torch.no_grad()
def layer_importance(walk: Walk, index: int) -> dict[str, Tensor]:
    """The importance of the columns of a layer's weights, float32 [k], by canonical name. Weights of
    experts that no token was routed to have none. The walk's texts pass the layer."""
    block = walk.layer(index)
    sums: dict[str, _Sum] = {}
    with _watched(block, index, sums):
        walk.leave(block)
    return {
        name: (each.total / each.count).float()
        for name, each in sums.items()
        if each.count and isinstance(each.total, Tensor)
    }


@contextmanager
def _watched(block: nn.Module, index: int, sums: dict[str, _Sum]) -> Iterator[None]:
    """In this context, the inputs of a block's linears are added to `sums`."""

    def add(names: tuple[str, ...], x: Tensor) -> None:
        for name in names:
            sums.setdefault(name, _Sum()).add(x)

    found = dict(block.named_modules())
    with ExitStack() as hooks:
        for path in LINEARS:
            if path in found:
                names = tuple(f"model.layers.{index}.{part}.weight" for part in PARTS[path])
                handle = found[path].register_forward_pre_hook(
                    lambda _, given, names=names: add(names, given[0])
                )
                hooks.callback(handle.remove)
        for module in block.modules():
            if isinstance(module, Experts):
                prefix = f"model.layers.{index}.mlp.experts"
                handle = module.register_forward_pre_hook(
                    lambda experts, given, prefix=prefix: _of_experts(experts, prefix, given[0], sums)
                )
                hooks.callback(handle.remove)
        yield


def _of_experts(experts: Experts, prefix: str, x: Tensor, sums: dict[str, _Sum]) -> None:
    """Add the inputs of each expert's weights: those of the tokens that the router assigns to it."""
    chosen = experts.route(x)[1]
    act = ACTIVATIONS[experts.activation]
    for i in range(experts.downs.num_experts):
        own = x[(chosen == i).any(-1)]
        for part in ("gate", "up"):
            sums.setdefault(f"{prefix}.{i}.{part}_proj.weight", _Sum()).add(own)
        gate, up = F.linear(own, experts.gate_ups.weight[i]).chunk(2, dim=-1)
        sums.setdefault(f"{prefix}.{i}.down_proj.weight", _Sum()).add(act(gate) * up)


@torch.no_grad()
def head_importance(walk: Walk) -> dict[str, Tensor]:
    """As `layer_importance`, for the head. Call it after the texts have passed all layers."""
    norm = walk.model.norm
    norm.to_empty(device="cpu")
    targets = destinations(walk.model)
    for name in (name for name in targets if name.startswith("model.norm.")):
        targets[name].copy_(whole(walk.checkpoint, name))
    found = _Sum()
    for x in walk.states:
        found.add(norm(x))
    assert isinstance(found.total, Tensor)
    return {HEAD: (found.total / found.count).float()}
