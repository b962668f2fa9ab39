"""Quantization schemes, by name. Pure; free of torch: a job is checked before any rank starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd

from base.errors import InputError

SCHEMES = (
    "int8",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g32-asym",
    "int4-g64-asym",
    "int4-g128-asym",
)
HEADS = ("int8", "same", "none")  # quant_head=: the LM head's scheme, if the layers have one of SCHEMES
MIN_GROUP = 32  # the smallest group size that the kernels support
# How weights that are not quantized are stored: safetensors' dtypes, and that of weights=random.
_PLAIN = frozenset({
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL",
    "random",
})  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized: `bits` per number (8 or 4); `group_size`, how many numbers of a row
    share a scale (0: the whole row); `symmetric`, whether 0 is in the middle of the range. Files may
    have schemes that are not in SCHEMES, such as int8-g32 (GGUF's Q8_0)."""

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}"

    def nbytes(self, n: int, k: int) -> int:
        """The bytes of a weight [n, k]: scales are float16 for groups, float32 for rows."""
        groups = -(-k // self.group_size) if self.group_size else 1
        per_group = (2 if self.group_size else 4) * (1 if self.symmetric else 2)
        return n * (k * self.bits // 8 + groups * per_group)

    def group_within(self, start: int, stop: int) -> int:
        """The group size of the columns [start, stop); 0 if these columns cannot be cut out."""
        if not self.group_size:
            return 0 if (stop - start) % MIN_GROUP else stop - start
        size = gcd(self.group_size, start, stop)
        return 0 if size % MIN_GROUP else size


# GGUF's blocks that stay quantized (weights.formats.gguf_blocks); others are dequantized.
GGUF_SCHEMES = {"Q4_0": Scheme(4, 32), "Q4_1": Scheme(4, 32, symmetric=False), "Q8_0": Scheme(8, 32)}


def parse_scheme(text: str) -> Scheme:
    """The scheme of a name such as "int8" or "int4-g32-asym". Raises InputError."""
    found = re.fullmatch(r"int([48])(?:-g(\d+))?(-asym)?", text)
    if found is None or text not in SCHEMES:
        raise InputError(
            f"quant={text} is not a scheme that Yoke has; take one of {', '.join(SCHEMES)}"
        )
    return Scheme(int(found[1]), int(found[2] or 0), found[3] is None)


def is_plain(stored_as: str) -> bool:
    """Whether a weight with this `stored_as` is plain, that is, not quantized."""
    return stored_as in _PLAIN
