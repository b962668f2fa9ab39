"""The values that a quantized weight can have: the scales and zero points of its groups, and how to
choose them.

The plain choice covers a group's range (`weights.quantize`). If a group has a few outliers, a smaller
scale clips these and is finer for the other numbers. The scale with the least error is found by trying
several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.quant import QuantWeight, integer_weight
from weights.quantize import TINY, quantize_rtn
from weights.schemes import Scheme

# Factors of the plain scale. None below 0.6 was ever chosen; finer steps did not change perplexity.
SHRUNK = tuple(1 - 0.025 * i for i in range(17))
_PIECE = 1 << 20  # numbers that are tried at once: a few temporaries of 4 MiB


@dataclass(frozen=True)
class Grid:
    """The grid of a weight. scale and zero are float32 [n, groups]: the integer q stands for
    (q - zero) * scale, with q within `limits`. Scales are already rounded to their stored dtype:
    float16 for 4 bits."""

    scheme: Scheme
    scale: Tensor
    zero: Tensor

    @property
    def limits(self) -> tuple[int, int]:
        return (-127, 127) if self.scheme.bits == 8 else (0, 15)

    def integers(self, weight: Tensor) -> Tensor:
        """The nearest integers q of a weight [n, k], as float32 [n, k]."""
        n, groups = self.scale.shape
        scale, zero = self.scale.unsqueeze(-1), self.zero.unsqueeze(-1)
        steps = (weight.view(n, groups, -1) * (1 / scale)).round_()  # as in `quantize_rtn`
        return steps.add_(zero).clamp_(*self.limits).view_as(weight)

    def values(self, q: Tensor) -> Tensor:
        """The values that the integers q, float32 [n, k], stand for."""
        n, groups = self.scale.shape
        grouped = q.view(n, groups, -1)
        return ((grouped - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)).view_as(q)

    def packed(self, q: Tensor) -> QuantWeight:
        """The quantized weight with the integers q, float32 [n, k]."""
        group = q.shape[1] // self.scale.shape[1]
        if self.scheme.bits == 8:
            return integer_weight(q.to(torch.int8), self.scale, None, 8, group)
        offset = None if self.scheme.symmetric else -self.zero * self.scale
        return integer_weight(q.to(torch.uint8), self.scale.half(), offset, 4, group)


def range_grid(weight: Tensor, scheme: Scheme) -> Grid:
    """The grid of `quantize_rtn`, which covers each group's range. Raises InputError as it does."""
    plain = quantize_rtn(weight, scheme)
    scale = plain.scale.float()
    if plain.offset is not None:
        zero = (-plain.offset / scale).round()
    else:
        zero = torch.full_like(scale, 8 if scheme.bits == 4 else 0)
    return Grid(scheme, scale, zero)


def search_grid(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Grid:
    """The grid with, for each group of a weight float32 [n, k], the scale of least squared error among
    the plain scale times each of `SHRUNK`. `importance` [k] weights each column's error. The zero
    points are those of `range_grid`. Raises InputError as it does."""
    grid = range_grid(weight, scheme)
    for rows in _pieces(*weight.shape):
        grid.scale[rows] = _search(
            weight[rows], Grid(scheme, grid.scale[rows], grid.zero[rows]), importance
        )
    return grid


def _search(weight: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    n, groups = grid.scale.shape
    best = torch.full_like(grid.scale, torch.inf)
    chosen = grid.scale.clone()
    for factor in SHRUNK:
        scale = grid.scale * factor
        if grid.scheme.bits == 4:
            scale = scale.half().float()
            scale = torch.where(scale == 0, TINY, scale)
        tried = Grid(grid.scheme, scale, grid.zero)
        error = (tried.values(tried.integers(weight)) - weight).square_()
        if importance is not None:
            error *= importance
        error = error.view(n, groups, -1).sum(-1)
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    return chosen


def _pieces(n: int, k: int) -> Iterator[slice]:
    step = max(_PIECE // k, 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
