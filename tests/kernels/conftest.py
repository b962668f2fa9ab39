"""What tests of kernels leave behind, and what those of attention begin with."""

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that share their cores with others wait for each other at every small operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
