"""GPTQ: round a weight column by column, and after each column adjust the columns not yet rounded so
that the layer's output changes least.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers (2022), with the order of columns and the fixed scales ("static groups") of the authors'
later code.

What is not here: where the inputs come from (`quantize.calibrate`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from base.errors import InputError
from quantize.grid import Grid

BLOCK = 128  # columns after which all later columns are updated in one matmul
_MORE_DAMPING = 4  # attempts, each with ten times the damping, if the Hessian is nearly singular


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, damp: float, sort: bool) -> Tensor:
    """The integers q, as float32 [n, k], for a weight float32 [n, k].

    hessian: float32 [k, k], the sum of x x^T over the layer's inputs x (any factor cancels out).
    `damp`: the fraction of the mean diagonal that is added to the diagonal. `sort`: columns with the
    largest diagonal are rounded first, while many columns are left to compensate for their errors. The
    grid is fixed in advance, so a column keeps its group in any order, and the result needs no group
    index.

    A column whose input was always 0 does not affect the others: it is rounded to the nearest. (The
    paper's code sets it to 0, but an input that did not occur in the calibration text may occur later.)

    Raises InputError if the Hessian is not positive definite with any of the dampings tried.
    """
    k = weight.shape[1]
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if sort else torch.arange(k)
    factor = inverse_factor(hessian[order][:, order], damp)
    group = k // grid.scale.shape[1]
    # Transposed, so that a column is contiguous.
    left = weight.t()[order].contiguous()  # [k, n]
    scale, zero = (each.t()[order // group].contiguous() for each in (grid.scale, grid.zero))
    q = torch.empty_like(left)
    low, high = grid.limits
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            torch.add(zero[i], left[i] / scale[i], out=q[i])
            q[i].round_().clamp_(low, high)
            error = (left[i] - (q[i] - zero[i]) * scale[i]) / factor[i, i]
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(q)
    result[order] = q
    return result.t().contiguous()


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian [k, k]. Row i says how an error in
    column i is compensated in the columns after it, once the columns before it are fixed. Raises
    InputError if the Hessian stays singular."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    diagonal[dead] = mean
    added = damp * mean
    for _ in range(_MORE_DAMPING):
        diagonal += added
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper
        added = 9 * added or 1e-4 * mean
    raise InputError(
        f"the Hessian of {hessian.shape[0]} columns cannot be inverted, because their inputs depend on "
        "each other too much; give a longer calibration text, or a larger damp="
    )
