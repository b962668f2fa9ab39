"""The sizes of packed weights that an estimate uses are those that packing makes."""

from __future__ import annotations

import pytest
import torch

from kernels.packed import pack_parts
from kernels.quant_linear import pack
from kernels.sizes import packed_bytes
from tests.models.forms import ALL, random_weight


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1, 32, 70])
def test_a_part_of_any_scheme(name: str, rows: int) -> None:
    scheme = ALL[name]
    for width in (512, 256):
        weight = random_weight(scheme, rows, width)
        tried = 0
        for start in range(0, width, 16):
            for stop in (start + 16, start + 32, start + 96, width):
                if start < stop <= width and scheme.can_cut(start, stop):
                    found = pack(weight.columns(start, stop)).nbytes
                    assert packed_bytes(scheme, rows, start, stop, width) == found, (start, stop)
                    tried += 1
        assert tried > 10


def test_a_plain_part() -> None:
    for rows, width in ((1, 32), (32, 64), (33, 48), (100, 96)):
        weight = torch.randn(rows, width).bfloat16()
        assert packed_bytes(None, rows, 0, width, width) == pack_parts([weight]).nbytes
