"""GPTQ against the slowest way to do it, and against rounding to the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from base.errors import InputError
from quantize.gptq import gptq, inverse_factor
from quantize.grid import Grid, range_grid, search_grid
from weights.quant import Scheme, parse_scheme
from weights.quantize import quantize_rtn

N, K = 24, 320


def inputs(count: int = 600, k: int = K, seed: int = 0) -> Tensor:
    """Correlated inputs of very different sizes, as layers have them: [count, k]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return (mixed + 8 * torch.randn(count, 1, generator=generator)) * torch.linspace(0.2, 3, k)


def weight(n: int = N, k: int = K) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1))


def hessian(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def naive(w: Tensor, h: Tensor, grid: Grid, damp: float, order: Tensor) -> Tensor:
    """Optimal Brain Surgeon as it is written down: after each column, the best change of all columns
    that are still free, from an inverse that is computed anew. In float64."""
    w, h = w.double().clone(), h.double().clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    group = w.shape[1] // grid.scale.shape[1]
    q = torch.empty_like(w)
    for place, j in enumerate(order.tolist()):
        scale, zero = grid.scale[:, j // group].double(), grid.zero[:, j // group].double()
        q[:, j] = (w[:, j] / scale + zero).round().clamp(*grid.limits)
        free = order[place:]
        inverse = torch.linalg.inv(h[free][:, free])
        error = (w[:, j] - (q[:, j] - zero) * scale) / inverse[0, 0]
        w[:, free] -= error.unsqueeze(1) * inverse[0]
    return q


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g64-asym"])
@pytest.mark.parametrize("sort", [False, True])
def test_blocks_of_columns_are_column_by_column(
    name: str, sort: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.gptq.BLOCK", 36)
    k = 128  # three blocks and a part of one
    w, h = weight(k=k), hessian(inputs(k=k))
    grid = range_grid(w, parse_scheme(name))
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if sort else torch.arange(k)
    ours, wanted = gptq(w, h, grid, 0.01, sort), naive(w, h, grid, 0.01, order)
    # A tie that float32 breaks otherwise changes what comes after it in its row: few, if any.
    assert (ours != wanted).float().mean() < 0.02
    changes = [grid.values(q.float()) - w for q in (ours, wanted)]
    ours_error, wanted_error = (float((change @ h * change).sum()) for change in changes)
    assert ours_error == pytest.approx(wanted_error, rel=0.01)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym"])
def test_outputs_err_less_than_rounded_ones(name: str, sort: bool) -> None:
    w, x = weight(), inputs()
    grid = range_grid(w, parse_scheme(name))

    def error(q: Tensor, x: Tensor) -> float:
        return float(((grid.values(q) - w) @ x.t()).square().sum())

    better = gptq(w, hessian(x), grid, 0.01, sort)
    assert error(better, x) < (0.5 if sort else 0.7) * error(grid.integers(w), x)
    assert better.min() >= 0 and better.max() <= 15 and torch.equal(better, better.round())
    # The numbers themselves err more: that is what the outputs gain from.
    assert (grid.values(better) - w).square().sum() > (grid.values(grid.integers(w)) - w).square().sum()


def test_independent_inputs_leave_nothing_to_gain() -> None:
    w = weight()
    grid = range_grid(w, Scheme(4, 32))
    for sort in (False, True):
        assert torch.equal(gptq(w, torch.eye(K) * 3, grid, 0.0, sort), grid.integers(w))


def test_an_input_that_never_occurs_takes_no_part() -> None:
    w, x = weight(), inputs()
    dead = torch.tensor([0, 5, 200, K - 1])
    x[:, dead] = 0
    grid = range_grid(w, Scheme(4, 64))
    q = gptq(w, hessian(x), grid, 0.01, True)
    assert torch.equal(q[:, dead], grid.integers(w)[:, dead])
    alive = [i for i in range(K) if i not in dead.tolist()]
    assert not torch.equal(q[:, alive], grid.integers(w)[:, alive])


def test_fewer_tokens_than_columns_are_damped_until_they_can_be_inverted() -> None:
    h = hessian(inputs(count=20))
    factor = inverse_factor(h, 0.0)
    assert factor.isfinite().all() and (factor.diagonal() > 0).all()
    assert torch.equal(factor, factor.triu())
    with pytest.raises(InputError, match="damp="):
        inverse_factor(torch.full((8, 8), torch.nan), 0.01)


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g64", "int4-g32-asym", "int4-g64-asym"])
def test_a_grid_is_what_plain_rounding_uses_and_packs_to_the_same(name: str) -> None:
    w = weight() * torch.logspace(-2, 3, N).unsqueeze(1)
    w[3, :64] = 0
    scheme = parse_scheme(name)
    plain, grid = quantize_rtn(w, scheme), range_grid(w, scheme)
    packed = grid.packed(grid.integers(w))
    assert torch.equal(packed.data, plain.data) and torch.equal(packed.scale, plain.scale)
    assert packed.group_size == plain.group_size and packed.bits == plain.bits
    # What is stored stands for what was computed with, bit for bit.
    assert torch.equal(packed.dequantize(), grid.values(grid.integers(w)))
    # To the nearest: half a step, and at an end of 0..15 up to another half, where a zero point was
    # rounded, or the range is not as far to the other side.
    step = grid.scale.abs().repeat_interleave(packed.group_size, 1)
    within = 0.51 if scheme.bits == 8 else 1.01
    assert ((packed.dequantize() - w).abs() <= within * step + 1e-9).all()


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64", "int4-g32-asym"])
def test_searched_scales_err_less(name: str) -> None:
    w = weight()
    w[:, ::40] *= 6
    scheme = parse_scheme(name)

    def error(grid: Grid, importance: Tensor | float = 1.0) -> Tensor:
        return ((grid.values(grid.integers(w)) - w).square() * importance).view(N, -1).sum(-1)

    plain, searched = range_grid(w, scheme), search_grid(w, scheme)
    assert (error(searched) <= error(plain)).all()
    assert error(searched).sum() < 0.99 * error(plain).sum()
    importance = torch.linspace(0, 1, K).square()
    weighted = search_grid(w, scheme, importance)
    assert error(weighted, importance).sum() <= error(searched, importance).sum()
    # What is searched can be stored.
    assert torch.equal(searched.scale, searched.scale.half().float())


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g32-asym"])
def test_what_cannot_be_quantized_is_refused(name: str) -> None:
    scheme = parse_scheme(name)
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = torch.ones(2, 64)
        w[1, 40] = bad
        with pytest.raises(InputError, match="not a number"):
            quantize_rtn(w, scheme)
    if scheme.bits == 4:
        with pytest.raises(InputError, match="beyond any weight"):
            quantize_rtn(torch.full((2, 64), 1e6), scheme)
        with pytest.raises(ValueError, match="groups of 32"):
            quantize_rtn(torch.ones(2, 48), scheme)
    zeros = quantize_rtn(torch.zeros(2, 64), scheme)
    assert torch.equal(zeros.dequantize(), torch.zeros(2, 64))
