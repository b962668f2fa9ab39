"""The instruction sets of the kernels, as parameters of tests: what cannot run here is skipped."""

from __future__ import annotations

import platform

import pytest
import torch
from _pytest.mark import ParameterSet

from kernels.load import load_kernels

assert load_kernels()
KNOWN = ("base", "avx2", "avx512", "avx512bf16", "amx") if platform.machine() == "x86_64" else ("base",)
SETS: list[str] = torch.ops.yoke_kernels.instruction_sets()  # those that run here, the best one last


def parameters(*names: str) -> list[ParameterSet]:
    """For `pytest.mark.parametrize`; a report names each that is skipped."""
    skips = {name: pytest.mark.skip(f"{name} does not run on this processor") for name in names}
    return [pytest.param(name, marks=() if name in SETS else skips[name]) for name in names]


EACH = parameters(*KNOWN)
