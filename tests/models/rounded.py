"""Weights that are rounded and dequantized again: what a model with quantized weights computes with."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.load_quant import read_rounded
from models.quant_rules import parse_asked, scheme_for
from weights.checkpoint import Checkpoint, Entry


def dequantized(checkpoint: Checkpoint, quant: str) -> Checkpoint:
    """The same weights, rounded and back."""

    def rounded(name: str, entry: Entry) -> Entry:
        own = scheme_for(name, parse_asked(quant))
        if own is None:
            return entry

        def read(slices: tuple[slice, ...]) -> torch.Tensor:
            whole = read_rounded(entry, tuple(slice(0, size) for size in entry.shape), own)
            return whole.dequantize()[slices]

        return Entry(entry.shape, "random", read)

    return replace(checkpoint, entries={n: rounded(n, e) for n, e in checkpoint.entries.items()})
