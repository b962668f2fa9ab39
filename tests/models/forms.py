"""Random weights of any scheme, and models of them: checkpoints in memory, without files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.config import EMBEDDING, HEAD, ModelConfig, expected_shapes
from tests.weights.random_weights import make_weight
from weights.checkpoint import Checkpoint, Entry, Slices
from weights.quant import Factors, QuantWeight
from weights.schemes import GGUF_SCHEMES, MXFP4, NVFP4, SCHEMES, Scheme, fp8_scheme, parse_scheme

ALL = {
    **{name: parse_scheme(name) for name in SCHEMES},
    **GGUF_SCHEMES,
    **{each.name: each for each in (MXFP4, NVFP4, fp8_scheme(0), fp8_scheme(64), fp8_scheme(128))},
}
# Heads, MLP and vocabulary that three ranks share unevenly; rows of whole super-groups. With 16 heads a
# border of three ranks is inside 32 columns.
CONFIG = ModelConfig(256, 2, 8, 4, 32, 512, 131, 128)
FINE = replace(CONFIG, num_heads=16, num_kv_heads=4, head_dim=16)
MIXED = {
    "0.self_attn.q": "Q4_K", "0.self_attn.k": "Q4_K", "0.self_attn.v": "Q6_K", "0.self_attn.o": "Q5_K",
    "0.mlp.gate": "IQ4_XS", "0.mlp.up": "Q4_K", "0.mlp.down": "Q6_K",
    "1.self_attn.k": "MXFP4", "1.self_attn.v": "NVFP4", "1.self_attn.o": "Q2_K",
    "1.mlp.gate": "Q3_K", "1.mlp.up": "fp8-g128", "1.mlp.down": "Q5_1",
}  # fmt: skip
# Groups of 16 wherever columns are cut, and plain weights in the middle.
FINE_MIXED = MIXED | {"0.self_attn.o": "Q6_K", "0.self_attn.k": "", "1.mlp.gate": ""}


def random_weight(scheme: Scheme, n: int, k: int, seed: int = 0) -> QuantWeight:
    """A weight [n, k] of a scheme, of numbers around zero."""
    made = make_weight(scheme, n, k, seed, _factor)
    groups, supers = made.groups, made.supers
    # The factor that is a float makes the numbers as large as those of a model, with a mean near zero.
    scale, offset = made.scales()
    times = 0.06 / float((made.values() * scale).std())
    mean = float((made.values() * scale).mean()) * times
    shift = 0.0 if offset is None else -mean / float(offset.mean())

    def scaled(each: Factors) -> Factors:
        if each.kind == "e8m0":
            return replace(each, scale=(each.scale.int() + round(math.log2(times))).to(torch.uint8))
        own = None if each.offset is None else (each.offset.float() * shift).to(each.offset.dtype)
        return replace(each, scale=(each.scale.float() * times).to(each.scale.dtype), offset=own)

    if supers is not None:
        return replace(made, supers=scaled(supers))
    return replace(made, groups=groups if groups.kind == "e4m3" else scaled(groups))


def _factor(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    low, high = {
        "i8": (-32, 32),
        "u8": (1, 64),
        "u4": (1, 16),
        "e8m0": (124, 130),
        "e4m3": (32, 72),
    }.get(kind, (0, 0))
    if high:
        found = torch.randint(low, high, shape, generator=generator)
        return found.to(torch.int8 if kind == "i8" else torch.uint8)
    return (torch.rand(shape, generator=generator) + 0.5).to({"f16": torch.float16}.get(kind))


def entry_of(weight: QuantWeight, form: str) -> Entry:
    """As a reader makes it, of a key of ALL."""
    whole = weight.dequantize()

    def quant(rows: slice, columns: slice) -> QuantWeight:
        return weight.rows(rows.start, rows.stop).columns(columns.start, columns.stop)

    return Entry(weight.shape, form, whole.__getitem__, scheme=ALL[form], quant=quant)


def plain_entry(shape: tuple[int, ...], seed: int) -> Entry:
    """Of numbers that bfloat16 holds."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) > 1:
        values *= 0.06
    whole = values.bfloat16()

    def read(slices: Slices) -> Tensor:
        return whole[slices].float()

    return Entry(shape, "BF16", read)


def checkpoint_of(
    config: ModelConfig, forms: Mapping[str, str], embedding: str = "", head: str = ""
) -> Checkpoint:
    """A model each of whose weights has the form that its name has in `forms`, without "model.layers."
    and "_proj.weight"; the others are plain."""
    entries = {}
    named = {**forms, EMBEDDING: embedding, HEAD: head}
    for seed, (name, shape) in enumerate(expected_shapes(config).items()):
        short = name.removeprefix("model.layers.").removesuffix("_proj.weight")
        form = named.get(short) or named.get(name)
        if not form:
            entries[name] = plain_entry(shape, seed)
        else:
            entries[name] = entry_of(random_weight(ALL[form], shape[0], shape[1], seed), form)
    return Checkpoint(Path("model.gguf"), "memory", entries)
