"""Pearson's chi-square test of counts against probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Z = 5.0  # standard deviations of a normal distribution: one false alarm in three million tests


def chi_square(found: Mapping[Any, int], wanted: Mapping[Any, float]) -> tuple[float, int]:
    """The statistic and its number of cells. Cells that hardly anything falls into are taken together;
    what cannot be makes it infinite."""
    total = sum(found.values())
    value, cells = 0.0, 0
    rest = [0.0, 0.0]
    for key in {**wanted, **found}:
        seen, expected = found.get(key, 0), total * wanted.get(key, 0.0)
        if expected == 0.0:
            if seen:
                return math.inf, cells
        elif expected < 5.0:
            rest = [rest[0] + seen, rest[1] + expected]
        else:
            value += (seen - expected) ** 2 / expected
            cells += 1
    if rest[1] >= 5.0:
        value += (rest[0] - rest[1]) ** 2 / rest[1]
        cells += 1
    return value, cells


def limit(cells: int) -> float:
    """What the statistic stays below, by Wilson and Hilferty's approximation (1931)."""
    k = cells - 1
    return k * (1 - 2 / (9 * k) + Z * math.sqrt(2 / (9 * k))) ** 3
