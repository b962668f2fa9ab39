"""Random quantized weights of every form that files have, and bounds for matmuls with them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.weights.random_weights import make_weight
from weights.quant import Factors, QuantWeight
from weights.schemes import GGUF_SCHEMES, NVFP4, Scheme, fp8_scheme

FORMS: dict[str, Scheme] = {
    **GGUF_SCHEMES,
    "NVFP4": NVFP4,
    "fp8": fp8_scheme(0),
    "fp8-g128": fp8_scheme(128),
    "int8": Scheme(8, 0),
    "int8-g64-asym": Scheme(8, 64, symmetric=False),
    "int4-g64": Scheme(4, 64),
    "int4-g128-asym": Scheme(4, 128, symmetric=False),
    "int4-g32 of float32": Scheme(4, 32, scales="f32"),
}


def _factor(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Factors of a kind, which differ by a factor of up to 100."""
    if kind in ("f16", "f32"):
        spread = 10 ** (torch.rand(shape, generator=generator) * 2 - 3)
        return spread.to(torch.float16 if kind == "f16" else torch.float32)
    low, high = {
        "i8": (-128, 128), "u8": (0, 64), "u4": (0, 16), "e8m0": (118, 128), "e4m3": (0, 0x7F),
    }[kind]  # fmt: skip
    dtype = torch.int8 if kind == "i8" else torch.uint8
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def random_weight(scheme: Scheme, n: int, k: int, seed: int) -> QuantWeight:
    """All codes occur; offsets are below zero, as they are where codes are not."""
    made = make_weight(scheme, n, k, seed, _factor)
    return replace(
        made,
        groups=_lowered(made.groups),
        supers=None if made.supers is None else _lowered(made.supers),
    )


def _lowered(factors: Factors) -> Factors:
    if factors.offset is None or factors.kind not in ("f16", "f32"):
        return factors
    return replace(factors, offset=-8 * factors.offset)


def terms(weight: QuantWeight) -> Tensor:
    """The sizes of both terms of each number, scale * value and offset, added: float64 [n, k]."""
    scale, offset = weight.scales()
    size = weight.values().double().abs() * scale.double().abs()
    return size if offset is None else size + offset.double().abs()


def allowed(x: Tensor, weight: QuantWeight, wanted: Tensor, name: str) -> Tensor:
    """The largest error of a matmul on the instruction set `name`: half a unit in the last place of
    bfloat16's 8 bits, and what float32 sums may lose in any order: each term is rounded a few times on
    its way and once for each sum that it is part of, k + 8 at most; more often with two factors, whose
    product is rounded where float32 does not hold it, k + 16. Terms are those before
    scale * value + offset cancel."""
    k, m = x.shape[-1], x.shape[:-1].numel()
    exact = weight.dequantize(torch.float64)
    size, more = terms(weight), 8 if weight.supers is None else 16
    bound = wanted.abs() * 2**-8 + x.double().abs() @ size.T * 2**-23 * (k + more) + 1e-30
    if weight.bits <= 6 and m <= {"avx512bf16": 15, "amx": 4}.get(name, 0):
        # Products of bytes take x to 16 bits of the largest of each 32.
        padded = torch.nn.functional.pad(x.double().abs(), (0, -k % 32))
        steps = padded.unflatten(-1, (-1, 32)).amax(-1)
        of_steps = torch.nn.functional.pad(size, (0, -k % 32)).unflatten(1, (-1, 32)).sum(-1)
        bound = bound + steps @ of_steps.T * 2**-15
    one_scale = weight.supers is None and weight.groups.scale.shape[1] == 1 and weight.offset is None
    if name == "amx" and m > 16 and not (one_scale and weight.group_size not in (16, 32)):
        # Matrix units take weights that are rounded to bfloat16, where rows are many.
        bound = bound + x.double().abs() @ exact.abs().T * 2**-9
    return bound
