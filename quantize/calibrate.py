"""A layer's weights quantised by GPTQ, with the inputs that they get in the quantised model.

The inputs of a product come through the layers before it as they were quantised, and through the
products before it in its own layer: queries, keys and values, then what follows attention, gate and
up, down.

What is not here: GPTQ itself (`quantize.gptq`), and reading and writing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.load import PARTS
from quantize.gptq import gptq
from quantize.grid import range_grid, search_grid
from quantize.walk import Walk
from tp.layers import ColumnLinear, RowLinear
from weights.errors import InputError
from weights.quant import QuantWeight
from weights.schemes import Scheme

# A block's products in the order in which a token comes by them.
PRODUCTS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.up", "mlp.down")


@dataclass(frozen=True)
class Settings:
    """How GPTQ works: see `quantize.gptq.gptq`; `search`: scales that err least, not those of the
    range."""

    scheme: Scheme
    search: bool
    damp: float
    sort: bool


@dataclass(frozen=True)
class Errors:
    """What quantising did to a weight, by its canonical name: the squared error of the weight and of
    its product's output over the calibration text (None without one), and what they are relative to."""

    name: str
    error: float
    square: float
    output_error: float | None = None
    output_square: float | None = None


@torch.no_grad()
def quantise_block(
    walk: Walk, block: nn.Module, index: int, settings: Settings
) -> Iterator[tuple[Errors, QuantWeight]]:
    """Quantise the products of a block in place, one after the other. Raises InputError."""
    found = dict(block.named_modules())
    for path in PRODUCTS:
        if path not in found:
            continue
        product = found[path]
        assert isinstance(product, ColumnLinear | RowLinear)
        names = [f"model.layers.{index}.{part}.weight" for part in PARTS[path]]
        hessian = hessian_of(walk.inputs(block, product), product.weight.shape[1])
        try:
            quantised, values = quantise_product(product.weight, hessian, settings)
        except InputError as error:
            raise InputError(f"{names[0]}: {error}") from error
        change = values - product.weight
        sizes = product.parts if isinstance(product, ColumnLinear) else product.weight.shape[:1]
        start = 0
        for name, size in zip(names, sizes, strict=True):
            rows = slice(start, start + size)
            old, new = product.weight[rows], change[rows]
            errors = Errors(
                name,
                float(new.square().sum()),
                float(old.square().sum()),
                _energy(new, hessian),
                _energy(old, hessian),
            )
            yield errors, quantised.rows(rows.start, rows.stop)
            start += size
        product.weight.copy_(values)


def hessian_of(inputs: Iterator[Tensor], size: int) -> Tensor:
    """The mean of x x^T over all tokens' inputs x: float32 [size, size]."""
    hessian, count = torch.zeros(size, size), 0
    for x in inputs:
        hessian.addmm_(x.t(), x)
        count += len(x)
    return hessian / max(count, 1)


def quantise_product(weight: Tensor, hessian: Tensor, settings: Settings) -> tuple[QuantWeight, Tensor]:
    """A weight float32 [n, k] quantised, and what it stands for. Raises InputError."""
    if settings.search:
        grid = search_grid(weight, settings.scheme, hessian.diagonal())
    else:
        grid = range_grid(weight, settings.scheme)
    q = gptq(weight, hessian, grid, settings.damp, settings.sort)
    return grid.packed(q), grid.values(q)


def _energy(weight: Tensor, hessian: Tensor) -> float:
    """The mean square of a weight's outputs, summed over its rows: the trace of W H W^T."""
    return float((weight @ hessian).mul_(weight).sum())
