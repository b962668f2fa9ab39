"""Quantize a layer's weights by GPTQ, with the inputs that they have in the quantized model.

The inputs of a linear come through the layers before it, already quantized, and through the linears
before it in its own layer. The order there is: q, k and v; the output projection of attention; gate and
up; down. An expert's inputs are those of the tokens that the router assigns to it.

What is not here: GPTQ itself (`quantize.gptq`), and reading and writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import InputError
from models.load import PARTS
from models.mlp import ACTIVATIONS, Experts
from quantize.gptq import gptq
from quantize.grid import range_grid, search_grid
from quantize.walk import Walk
from tp.layers import ColumnLinear, RowLinear
from weights.quant import QuantWeight
from weights.schemes import Scheme

# A block's linears, in the order in which a token passes them.
LINEARS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.up", "mlp.down")


@dataclass(frozen=True)
class Settings:
    """GPTQ's settings: `damp` and `sort` as in `quantize.gptq.gptq`; `search`: use the scales with the
    least error (`quantize.grid.search_grid`), not those that cover the range."""

    scheme: Scheme
    search: bool
    damp: float
    sort: bool


@dataclass(frozen=True)
class Errors:
    """The effect of quantization on the weight of a canonical name. `error`: the squared error of the
    weight; `square`: the sum of its squares. `output_error` and `output_square`: the same for the
    outputs over the calibration text; None without a text, and for an expert that none of its tokens
    was routed to."""

    name: str
    error: float
    square: float
    output_error: float | None = None
    output_square: float | None = None


@torch.no_grad()
def quantize_block(
    walk: Walk, block: nn.Module, index: int, settings: Settings
) -> Iterator[tuple[Errors, QuantWeight]]:
    """Quantize the linears of a block in place, one after the other. Yields the errors and the
    quantized form of each weight. Raises InputError."""
    found = dict(block.named_modules())
    for path in LINEARS:
        if path not in found:
            continue
        linear = found[path]
        assert isinstance(linear, ColumnLinear | RowLinear)
        names = [f"model.layers.{index}.{part}.weight" for part in PARTS[path]]
        sizes = linear.parts if isinstance(linear, ColumnLinear) else linear.weight.shape[:1]
        inputs = walk.inputs(block, linear)
        yield from _quantize(linear.weight, dict(zip(names, sizes, strict=True)), inputs, settings)
    for module in block.modules():
        if isinstance(module, Experts):
            prefix = f"model.layers.{index}.mlp.experts"
            yield from _quantize_experts(module, prefix, list(walk.inputs(block, module)), settings)


def _quantize_experts(
    experts: Experts, prefix: str, inputs: Sequence[Tensor], settings: Settings
) -> Iterator[tuple[Errors, QuantWeight]]:
    """As `quantize_block`, for experts: each has the `inputs` that the router assigns to it."""
    chosen = [experts.route(x)[1] for x in inputs]
    act = ACTIVATIONS[experts.activation]
    for i in range(experts.downs.num_experts):
        gate_up, down = experts.gate_ups.weight[i], experts.downs.weight[i]
        width = down.shape[1]
        own = [x[(ids == i).any(-1)] for x, ids in zip(inputs, chosen, strict=True)]
        sizes = {f"{prefix}.{i}.{part}_proj.weight": width for part in ("gate", "up")}
        yield from _quantize(gate_up, sizes, iter(own), settings)
        halves = (F.linear(x, gate_up).chunk(2, dim=-1) for x in own)
        hidden = (act(gate) * up for gate, up in halves)
        yield from _quantize(down, {f"{prefix}.{i}.down_proj.weight": len(down)}, hidden, settings)


def _quantize(
    weight: Tensor, sizes: Mapping[str, int], inputs: Iterator[Tensor], settings: Settings
) -> Iterator[tuple[Errors, QuantWeight]]:
    """Quantize a fused weight [n, k] in place. `sizes`: the row count of each fused weight, by name. A
    weight without inputs is rounded to the nearest."""
    hessian = hessian_of(inputs, weight.shape[1])
    try:
        quantized, values = quantize_matrix(weight, hessian, settings)
    except InputError as error:
        raise InputError(f"{next(iter(sizes))}: {error}") from error
    change = values - weight
    start = 0
    for name, size in sizes.items():
        rows = slice(start, start + size)
        old, new = weight[rows], change[rows]
        errors = Errors(name, float(new.square().sum()), float(old.square().sum()))
        if hessian is not None:
            errors = replace(
                errors, output_error=_energy(new, hessian), output_square=_energy(old, hessian)
            )
        yield errors, quantized.rows(rows.start, rows.stop)
        start += size
    weight.copy_(values)


def hessian_of(inputs: Iterator[Tensor], size: int) -> Tensor | None:
    """The mean of x x^T over the inputs x of all tokens: float32 [size, size]; None without inputs."""
    hessian, count = torch.zeros(size, size), 0
    for x in inputs:
        hessian.addmm_(x.t(), x)
        count += len(x)
    return hessian / count if count else None


def quantize_matrix(
    weight: Tensor, hessian: Tensor | None, settings: Settings
) -> tuple[QuantWeight, Tensor]:
    """Quantize a weight float32 [n, k]; returns it and its dequantized values. Without a `hessian` it
    is rounded to the nearest. Raises InputError."""
    if settings.search:
        importance = None if hessian is None else hessian.diagonal()
        grid = search_grid(weight, settings.scheme, importance)
    else:
        grid = range_grid(weight, settings.scheme)
    if hessian is None:
        q = grid.integers(weight)
    else:
        q = gptq(weight, hessian, grid, settings.damp, settings.sort)
    return grid.packed(q), grid.values(q)


def _energy(weight: Tensor, hessian: Tensor) -> float:
    """The mean square of a weight's outputs, summed over its rows: the trace of W H W^T."""
    return float((weight @ hessian).mul_(weight).sum())
