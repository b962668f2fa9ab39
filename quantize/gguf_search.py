"""Quantize rows to GGUF's block forms, with the scales that have the least weighted squared error.

A group of 16 or 32 numbers has a scale, and in Q4_K and Q5_K a minimum, which are integers times the
float16 numbers of a super-group of 256. They are chosen in four steps:

1. Several steps between codes are tried for each group. Each gives codes, and the codes give scale and
   minimum by least squares; those with the least error are kept.
2. The super-group's factors follow from the largest scale and the largest minimum of its groups.
3. For each group the integers beside the nearest one are tried too, with the codes that follow.
4. With codes and integers fixed, the super-group's factors are solved by least squares. Groups and
   codes are then chosen again, and kept where the error is less.

The error of a number is weighted by the importance of its column (`quantize.importance`). Without one
it is weighted by a guess: a weight far from zero counts more, since it is one that training made large.

Sources: the idea of searching for scales and minimums is that of ggml's k-quants (Kawrakow, 2023); the
search and step 4 are ours. What is not here: the bytes of blocks (quantize.gguf_pack).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weights.quant import Factors, QuantWeight
from weights.schemes import CODES, GGUF_SCHEMES, Scheme

_PIECE = 1 << 17  # numbers that are searched at once: the temporaries stay in a core's cache
# The range of a group has so many times as many steps as there are codes: fewer use codes between the
# nearest ones, more clip the largest numbers.
_SHARES = (0.96, 1.0, 1.04, 1.09, 1.16, 1.28, 1.5)
_CLIPS = 1.08  # from this share on
_REFINED = 2  # so many times codes are chosen again for the scales found, and scales for these codes
_ROUNDS = 2  # of step 4
_LARGEST = 65504.0  # of float16
Importance = Tensor | None


@dataclass(frozen=True)
class _Pieces:
    """Numbers float32 [size, groups] with their weights, and how many codes there are. Codes are from 0
    to `top`; a code stands for itself less `zero`. Groups are the last dimension, which is long: sums
    over short rows take several times as long."""

    x: Tensor
    weight: Tensor
    top: int
    zero: int


def quantize_rows(form: str, weight: Tensor, importance: Importance = None) -> QuantWeight:
    """Quantize a weight float32 [n, k] to one of weights.schemes.GGUF_SCHEMES, where k is a multiple of
    its block (32, or 256 for K-quants). `importance` [k] weights each column's error; it must be finite
    and not negative. The numbers must be finite and small enough for float16 scales."""
    scheme = GGUF_SCHEMES[form]
    n, k = weight.shape
    if form == "Q8_0":
        return _by_range(weight)
    choose = _super_groups if scheme.super_scales else _plain_groups
    step = max(_PIECE // k, 1)
    parts = [choose(rows, scheme, importance) for rows in weight.split(step)]
    code, *factors = (torch.cat(each) for each in zip(*parts, strict=True))
    data = code.view(n, k)
    if not scheme.super_scales:
        scale = factors[0].view(n, -1)
        offset = None if scheme.symmetric else factors[1].view(n, -1)
        return QuantWeight(data, scheme.code_name, Factors(scheme.group_size, scale, offset))
    d, scale = factors[0].view(n, -1), factors[1].view(n, -1)
    if scheme.symmetric:
        groups, supers = Factors(scheme.group_size, scale), Factors(scheme.super_size, d)
    else:
        groups = Factors(scheme.group_size, scale, factors[3].view(n, -1))
        supers = Factors(scheme.super_size, d, -factors[2].view(n, -1))
    return QuantWeight(data, scheme.code_name, groups, supers)


def _by_range(weight: Tensor) -> QuantWeight:
    """Q8_0: a scale that covers the range, as ggml has it. 255 steps need no search."""
    n, k = weight.shape
    x = weight.reshape(n, k // 32, 32)
    scale = _half(x.abs().amax(-1) / 127)
    code = (x * _inverse(scale).unsqueeze(-1)).round_().clamp_(-127, 127)
    return QuantWeight(code.view(n, k).to(torch.int8), "i8", Factors(32, scale.half()))


def _grouped(rows: Tensor, scheme: Scheme, importance: Importance) -> _Pieces:
    size = scheme.group_size
    x = rows.reshape(-1, size).t().contiguous()
    if importance is not None:
        # Columns that no text has used must not be lost: they get a thousandth of the mean.
        least = importance.mean().clamp(min=1e-30) * 1e-3
        weight = (importance + least).view(-1, size).t().repeat(1, len(rows))
    else:
        square = x.square()
        mean = square.mean(0)
        weight = square + mean if scheme.symmetric else x.abs() + mean.sqrt()
        weight = weight.clamp_(min=1e-20)
    codes = CODES[scheme.code_name]
    return _Pieces(x, weight, (1 << codes.bits) - 1, -int(codes.values[0]))


def _plain_groups(rows: Tensor, scheme: Scheme, importance: Importance) -> list[Tensor]:
    """Q4_0, Q4_1, Q5_0, Q5_1: codes, float16 scales, and float16 offsets if there are any."""
    pieces = _grouped(rows, scheme, importance)
    if scheme.symmetric:
        scale = _half(_search_scale(pieces))
        return [_by_rows(_codes(pieces, scale, None)), scale.half()]
    scale, offset = _search_affine(pieces, any_offset=True)
    scale, offset = _half(scale), _half(offset)
    return [_by_rows(_codes(pieces, scale, offset)), scale.half(), offset.half()]


def _super_groups(rows: Tensor, scheme: Scheme, importance: Importance) -> list[Tensor]:
    """Codes; d (float16) and integer scales of groups; for Q4_K and Q5_K also those of minimums."""
    pieces = _grouped(rows, scheme, importance)
    per = scheme.super_size // scheme.group_size
    if scheme.symmetric:
        scale = _search_scale(pieces).view(-1, per)
        largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        d, low, high = _half(largest / -128), -128, 127
        chosen = _Chosen(d, _nearest(scale, d, low, high), None, None)
    else:
        scale, offset = (each.view(-1, per) for each in _search_affine(pieces, any_offset=False))
        low, high = 0, 63
        d, m = _half(scale.amax(1, keepdim=True) / 63), _half((-offset).amax(1, keepdim=True) / 63)
        chosen = _Chosen(d, _nearest(scale, d, low, high), m, _nearest(-offset, m, low, high))
    chosen = _beside(pieces, chosen, low, high)
    for _ in range(_ROUNDS):
        again = _beside(pieces, _solved(pieces, chosen), low, high)
        better = _error(pieces, again).view(-1, per).sum(1) < _error(pieces, chosen).view(-1, per).sum(
            1
        )
        chosen = chosen.replaced(better.unsqueeze(1), again)
    code = _by_rows(_codes(pieces, *chosen.factors()))
    scales = [chosen.d.half(), chosen.scale.to(torch.int8 if scheme.symmetric else torch.uint8)]
    if chosen.m is None or chosen.low is None:
        return [code, *scales]
    return [code, *scales, chosen.m.half(), chosen.low.to(torch.uint8)]


def _by_rows(code: Tensor) -> Tensor:
    """Codes float32 [size, groups] in the order of the weight's rows: uint8 [groups, size]."""
    return code.to(torch.uint8).t().contiguous()


@dataclass(frozen=True)
class _Chosen:
    """The factors of super-groups: d and m [S, 1] of float16 value, the integers `scale` and `low` [S,
    groups]; m and low are None without minimums. A number is d * scale * (code - zero) - m * low."""

    d: Tensor
    scale: Tensor
    m: Tensor | None
    low: Tensor | None

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """The scale and the offset of each group [groups]."""
        scale = (self.d * self.scale).view(-1)
        return scale, None if self.m is None else (self.m * -self.low).view(-1)  # type: ignore[operator]

    def replaced(self, where: Tensor, other: _Chosen) -> _Chosen:
        """`other` where the mask says so: [S, 1], or [S, groups] if both have the same d and m."""

        def pick(mine: Tensor, others: Tensor) -> Tensor:
            return mine if mine is others else torch.where(where, others, mine)

        m, low = self.m, self.low
        if m is not None and low is not None and other.m is not None and other.low is not None:
            m, low = pick(m, other.m), pick(low, other.low)
        return _Chosen(pick(self.d, other.d), pick(self.scale, other.scale), m, low)


def _codes(pieces: _Pieces, scale: Tensor, offset: Tensor | None) -> Tensor:
    """The nearest codes, float32 [size, groups], for the scales and offsets of groups."""
    inverse = _inverse(scale)
    zero = pieces.zero if offset is None else pieces.zero - offset * inverse
    return (pieces.x * inverse).add_(zero).round_().clamp_(0, pieces.top)


def _error(pieces: _Pieces, chosen: _Chosen) -> Tensor:
    """The weighted squared error of each group, with its nearest codes."""
    scale, offset = chosen.factors()
    start = -pieces.zero * scale if offset is None else offset - pieces.zero * scale
    found = _codes(pieces, scale, offset).mul_(scale).add_(start).sub_(pieces.x)
    return found.square_().mul_(pieces.weight).sum(0)


def _search_scale(pieces: _Pieces) -> Tensor:
    """The best scales [groups] without offsets, of either sign: step 1. The largest number gets the
    code 0 or one near it, so that all codes are used; or it is clipped."""
    x, weight, zero = pieces.x, pieces.weight, pieces.zero
    inverse = _inverse(x.gather(0, x.abs().argmax(0, keepdim=True)))[0]
    wx = weight * x
    best = torch.zeros(x.shape[1])
    scale = torch.zeros(x.shape[1])

    def attempt(unit: Tensor) -> None:
        nonlocal best, scale
        code = (x * unit).round_().clamp_(-zero, pieces.top - zero)
        up, down = (wx * code).sum(0), code.square_().mul_(weight).sum(0)
        fitted = up * _inverse(down)
        gain = up * fitted  # by how much the error is below that of zeros
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)

    for share in _SHARES:
        attempt(inverse * (-zero * share))
    for _ in range(_REFINED):
        attempt(_inverse(scale))
    return scale


def _search_affine(pieces: _Pieces, any_offset: bool) -> tuple[Tensor, Tensor]:
    """The best scales and offsets [groups]: step 1. Offsets are at most 0 unless `any_offset`."""
    x, weight, top = pieces.x, pieces.weight, pieces.top
    low, high = x.amin(0), x.amax(0)
    if not any_offset:
        low = low.clamp(max=0)
    inverse = _inverse(high - low)
    wx = weight * x
    sum_w, sum_x = weight.sum(0), wx.sum(0)
    # The range itself is the choice for groups of equal numbers, for which there is no other.
    scale, offset = (high - low) / top, low
    best = torch.full_like(low, -torch.inf)

    def attempt(unit: Tensor, start: Tensor) -> None:
        nonlocal best, scale, offset
        code = (x * unit).sub_(start * unit).round_().clamp_(0, top)
        wc = weight * code
        sum_c, sum_cc, sum_cx = wc.sum(0), wc.mul_(code).sum(0), code.mul_(wx).sum(0)
        inverse_d = _inverse(sum_w * sum_cc - sum_c.square())
        fitted = (sum_w * sum_cx - sum_x * sum_c) * inverse_d
        moved = (sum_cc * sum_x - sum_c * sum_cx) * inverse_d
        if not any_offset:
            over = moved > 0
            fitted = torch.where(over, sum_cx * _inverse(sum_cc), fitted)
            moved = torch.where(over, 0.0, moved)
        gain = fitted * sum_cx + moved * sum_x  # as above: both were found by least squares
        better = (gain > best) & (fitted > 0)
        best = torch.where(better, gain, best)
        scale, offset = torch.where(better, fitted, scale), torch.where(better, moved, offset)

    for share in _SHARES:
        attempt(inverse * (top * share), low)
        if share > _CLIPS:  # also from both sides, and from below
            beyond = (high - low) * (1 - 1 / share)
            attempt(inverse * (top * share), low + beyond / 2)
            attempt(inverse * (top * share), low + beyond)
    for _ in range(_REFINED):
        attempt(_inverse(scale), offset)
    return scale, offset


def _beside(pieces: _Pieces, chosen: _Chosen, low: int, high: int) -> _Chosen:
    """The best of the integers of each group and those beside them: step 3."""
    best, error = chosen, _error(pieces, chosen)

    def attempt(tried: _Chosen) -> None:
        nonlocal best, error
        found = _error(pieces, tried)
        better = found < error
        error = torch.where(better, found, error)
        best = best.replaced(better.view(best.scale.shape), tried)

    for change in (-1, 1):
        attempt(replace(chosen, scale=(chosen.scale + change).clamp(low, high)))
    if chosen.low is not None:
        chosen = best
        assert chosen.low is not None
        for change in (-1, 1):
            attempt(replace(chosen, low=(chosen.low + change).clamp(low, high)))
        chosen = best
        assert chosen.low is not None
        for change in (-1, 1):  # a larger scale and a larger minimum go together
            attempt(
                replace(
                    chosen,
                    scale=(chosen.scale + change).clamp(low, high),
                    low=(chosen.low + change).clamp(low, high),
                )
            )
    return best


def _solved(pieces: _Pieces, chosen: _Chosen) -> _Chosen:
    """d and m by least squares for the codes and integers that are chosen: step 4."""
    weight, x, scale = pieces.weight, pieces.x, chosen.scale
    code = _codes(pieces, *chosen.factors()).sub_(pieces.zero)
    wc = weight * code

    def total(of_groups: Tensor) -> Tensor:
        """The sum over each super-group, [S, 1]."""
        return of_groups.sum(1, keepdim=True)

    sum_cx, sum_cc = (each.sum(0).view(scale.shape) for each in (wc * x, wc * code))
    aa, ax = total(scale.square() * sum_cc), total(scale * sum_cx)
    if chosen.low is None:
        return replace(chosen, d=_half(ax * _inverse(aa)))
    low = chosen.low
    sum_w, sum_x, sum_c = (each.sum(0).view(scale.shape) for each in (weight, weight * x, wc))
    bb, bx, ab = total(low.square() * sum_w), total(low * sum_x), total(low * scale * sum_c)
    inverse = _inverse(aa * bb - ab.square())
    d, m = (ax * bb - ab * bx) * inverse, (ab * ax - aa * bx) * inverse
    alone = (bb == 0) | (m < 0) | (d <= 0)  # only d counts, or the solution cannot be stored
    d, m = torch.where(alone, chosen.d, d), torch.where(alone, chosen.m, m)  # type: ignore[arg-type]
    return replace(chosen, d=_half(d), m=_half(m))


def _nearest(values: Tensor, unit: Tensor, low: int, high: int) -> Tensor:
    """The integers from `low` to `high` nearest to values / unit, as float32."""
    return (values * _inverse(unit)).round_().clamp_(low, high)


def _inverse(values: Tensor) -> Tensor:
    """1 / values; 0 for 0, and for values whose inverse is not finite."""
    inverse = 1 / values
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _half(values: Tensor) -> Tensor:
    """Values rounded to float16, as float32."""
    return values.clamp(-_LARGEST, _LARGEST).half().float()


EncodeRows = Callable[[str, Tensor, Importance], QuantWeight]
