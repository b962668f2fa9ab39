"""Random blocks of every GGUF format, with the scales that a test wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from tests.weights.samples import write_gguf

Blocks = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

# The bytes at which a block has float16 scales and minima.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ1_S": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
# The bytes that are scales of 8 bits, and the code of no number.
FLOATS = {"MXFP4": (range(1), 255), "NVFP4": (range(4), 127)}
KEPT = (*(form for form in HALVES if not form.startswith("TQ")), *FLOATS, "IQ1_M")


def random_blocks(form: str, rng: np.random.Generator, rows: int, columns: int) -> Blocks:
    """Rows of blocks of any bytes, except that scales are finite: uint8 [rows, bytes]."""
    numbers, size = GGML_QUANT_SIZES[Kind[form]]
    raw = rng.integers(0, 256, (rows, columns // numbers, size), np.uint8)
    for at in HALVES.get(form, ()):
        raw[..., at + 1] &= 0xFB  # the lowest bit of the exponent: not all of its bits are set
    if form == "IQ1_M":  # the upper half of a byte
        raw[..., 53] &= 0xBF
        raw[..., 55] &= 0xBF
    if form in FLOATS:
        places, wrong = FLOATS[form]
        raw[..., places] = np.minimum(raw[..., places], 252 if form == "MXFP4" else wrong - 1)
    return raw.reshape(rows, -1)


def set_scale(raw: Blocks, form: str, row: int, block: int, which: int, half: int) -> None:
    """Give one block a scale: the bits of a float16, or its lowest byte where scales are of 8 bits.
    `which`: the number of the scale among those of the block."""
    size = GGML_QUANT_SIZES[Kind[form]][1]
    stored = raw[row, block * size : (block + 1) * size]
    if form in FLOATS:
        stored[FLOATS[form][0][which]] = half & 255
    elif form == "IQ1_M":
        for i in range(4):
            stored[49 + 2 * i] = stored[49 + 2 * i] & 15 | (half >> 4 * i & 15) << 4
    else:
        at = HALVES[form][which]
        stored[at : at + 2] = half & 255, half >> 8


def num_scales(form: str) -> int:
    return len(FLOATS[form][0]) if form in FLOATS else len(HALVES.get(form, (0,)))


def down_file(path: Path, form: str, raw: Blocks) -> Path:
    """A GGUF file whose only tensor is a layer's down projection, or those of a stack of experts."""
    name = "blk.0.ffn_down_exps.weight" if raw.ndim == 3 else "blk.0.ffn_down.weight"
    experts = len(raw) if raw.ndim == 3 else None
    return write_gguf(path, {name: raw}, {name: Kind[form]}, expert_count=experts)
