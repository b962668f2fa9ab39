"""What tests of kernels leave behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.load import load_kernels

assert load_kernels()
OPS = torch.ops.yoke_kernels


@pytest.fixture(autouse=True)
def best_afterwards() -> Iterator[None]:
    """The instruction set that is chosen unless a test sets another."""
    yield
    OPS.use_instruction_set(OPS.instruction_sets()[-1])
