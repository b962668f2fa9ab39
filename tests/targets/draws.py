"""What ranks draw from one seeded generator: tensors of all dtypes and shapes, in all forms of memory.

So each rank knows what the others contribute, and what must come out.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SUMMABLE = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
MOVABLE = (
    *SUMMABLE,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.complex64,
    torch.float8_e4m3fn,
)
DRESSES = ("plain", "shifted", "transposed", "gaps", "conjugate")


@dataclass
class Session:
    """What a rank needs for a sequence. `digest` grows with every result that all ranks share."""

    rank: int
    size: int
    draw: random.Random
    digest: Any = field(default_factory=hashlib.sha256)

    def numbers(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """What each rank contributes."""
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 40))
        return [random_tensor(shape, dtype, generator) for _ in range(self.size)]

    def shared(self, result: Tensor) -> None:
        self.digest.update(bits(result).numpy().tobytes())


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype in (torch.int32, torch.int64):  # sums wrap around
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).mul(4).to(dtype)


def bits(x: Tensor) -> Tensor:
    plain = x.resolve_conj().resolve_neg().reshape(-1)
    return plain.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def reference_sum(everyone: list[Tensor]) -> Tensor:
    """In rank order; floats in fp32 with one rounding."""
    if not everyone[0].is_floating_point():
        return torch.stack(everyone).sum(0, dtype=everyone[0].dtype)
    total = everyone[0].float()
    for x in everyone[1:]:
        total = total + x.float()
    return total.to(everyone[0].dtype)


def dress(x: Tensor, how: str) -> Tensor:
    """The same numbers in other memory: shifted by an element, transposed, with gaps."""
    if how == "shifted":
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)
        memory[1:] = x.flatten()
        return memory[1:].view(x.shape)
    if how == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    if how == "gaps" and x.dim() > 0:
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "conjugate" and x.is_complex():
        return x.conj().resolve_conj().conj()
    return x.clone()


def random_shape(draw: random.Random, slot: int, unit: int) -> tuple[int, ...]:
    """Mostly small and odd; now and then nothing, a scalar, about a buffer, or several."""
    kind = draw.randrange(14)
    if kind == 0:
        return draw.choice([(0,), (0, 3), (), (1,)])
    if kind == 1:
        return (slot // unit + draw.randrange(-1, 2),)
    if kind == 2:
        return (draw.randrange(slot // unit, 3 * slot // unit),)
    if kind < 7:
        return (draw.randrange(1, 20), draw.randrange(1, 90))
    return (draw.randrange(1, 3000),)
