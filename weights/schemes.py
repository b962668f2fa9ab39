"""How weights are quantized: codes, and the scales that they are multiplied by. Pure; free of torch: a
job is checked before any rank starts.

A number of a weight is stored as a code of a few bits (`CODES`). Its value is multiplied by the scale
of its group, and the offset of the group is added. The scale may be the product of two factors: one of
the group, and one of a super-group. So any scheme of a file is one `Scheme`, and the kernels know
codes and kinds of factors, but no formats.

What is not here: the numbers (weights.quant).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
MIN_GROUP = 32  # the smallest group size of weights that are quantized here, and the columns of a step
FINE_GROUPS = (16, 32)  # groups that have a factor of their own beside the super-group's
# How weights that are not quantized are stored: safetensors' dtypes, and that of weights=random.
_PLAIN = frozenset({
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "I16", "I8", "U8",
    "BOOL", "random",
})  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """The codes of `bits` bits, and the value of each. `values` is empty where the code's bits are the
    number itself: "i8" is an int8, "e4m3" a float of 8 bits."""

    bits: int
    values: tuple[float, ...] = ()


def _integers(bits: int, zero: int) -> Codes:
    return Codes(bits, tuple(float(code - zero) for code in range(1 << bits)))


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = {
    "i8": Codes(8),
    "e4m3": Codes(8),
    "i4": _integers(4, 8),
    "u4": _integers(4, 0),
    "u2": _integers(2, 0),
    "i3": _integers(3, 4),
    "i5": _integers(5, 16),
    "u5": _integers(5, 0),
    "i6": _integers(6, 32),
    # The table of ggml's IQ4_NL and IQ4_XS (`kvalues_iq4nl`).
    "iq4": Codes(4, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    "e2m1": Codes(4, (*_E2M1, *(-value for value in _E2M1))),
}
# The bytes of one factor, by kind. "u4": scale and offset share a byte.
FACTOR_BYTES = {"f16": 2.0, "f32": 4.0, "i8": 1.0, "u8": 1.0, "e8m0": 1.0, "e4m3": 1.0, "u4": 0.5}


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized: `bits` per number; `group_size`, how many numbers of a row share a
    scale (0: the whole row); `symmetric`, whether there are no offsets.

    Without the rest: integers of 8 or 4 bits with float16 scales (float32 for whole rows). `codes` is a
    key of CODES, `scales` a key of FACTOR_BYTES. `super_scales` and `super_size` describe the factor
    that super-groups have besides ("": none; size 0: the whole row). `label` is a format's name for the
    scheme. Files may have schemes that are not in SCHEMES, such as int8-g32 (GGUF's Q8_0).
    """

    bits: int
    group_size: int
    symmetric: bool = True
    codes: str = ""
    scales: str = ""
    super_scales: str = ""
    super_size: int = 0
    label: str = ""

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}"

    @property
    def code_name(self) -> str:
        """The key of CODES."""
        return self.codes or ("i8" if self.bits == 8 else "i4" if self.symmetric else "u4")

    @property
    def scale_kind(self) -> str:
        """The kind of the groups' scales, a key of FACTOR_BYTES."""
        return self.scales or ("f16" if self.group_size else "f32")

    @property
    def unit(self) -> int:
        """Columns can be cut at multiples of this."""
        return 16 if self.group_size == 16 else MIN_GROUP

    def nbytes(self, n: int, k: int) -> int:
        """The bytes of a weight [n, k], or of any `k` columns of one, without padding."""
        factors = 1 if self.symmetric else 2
        groups = -(-k // self.group_size) if self.group_size else 1
        size = k * self.bits / 8 + groups * factors * FACTOR_BYTES[self.scale_kind]
        if self.super_scales:
            supers = -(-k // self.super_size) if self.super_size else 1
            size += supers * factors * FACTOR_BYTES[self.super_scales]
        return round(n * size)

    def can_cut(self, start: int, stop: int) -> bool:
        """Whether the columns [start, stop) can be cut out of a weight."""
        if not self.group_size and not self.super_scales:
            return (stop - start) % MIN_GROUP == 0
        return start % self.unit == 0 and stop % self.unit == 0


def _k_quant(label: str, codes: str, group: int, scales: str, symmetric: bool = True) -> Scheme:
    return Scheme(CODES[codes].bits, group, symmetric, codes, scales, "f16", 256, label)


def _of_grid(label: str, codes: str, group: int, symmetric: bool = True) -> Scheme:
    """Of a codebook (weights.formats.gguf_grids): the stored float16 times a power of two or an odd
    number, which only float32 holds exactly."""
    return Scheme(CODES[codes].bits, group, symmetric, codes, "u8", "f32", 256, label)


# GGUF's blocks that stay quantized (weights.formats.gguf_blocks); others are dequantized.
GGUF_SCHEMES = {
    "Q4_0": Scheme(4, 32),
    "Q4_1": Scheme(4, 32, symmetric=False),
    "Q8_0": Scheme(8, 32),
    "Q5_0": Scheme(5, 32, codes="i5", label="Q5_0"),
    "Q5_1": Scheme(5, 32, symmetric=False, codes="u5", label="Q5_1"),
    "Q2_K": _k_quant("Q2_K", "u2", 16, "u4", symmetric=False),
    "Q3_K": _k_quant("Q3_K", "i3", 16, "i8"),
    "Q4_K": _k_quant("Q4_K", "u4", 32, "u8", symmetric=False),
    "Q5_K": _k_quant("Q5_K", "u5", 32, "u8", symmetric=False),
    "Q6_K": _k_quant("Q6_K", "i6", 16, "i8"),
    "IQ4_NL": Scheme(4, 32, codes="iq4", label="IQ4_NL"),
    "IQ4_XS": _k_quant("IQ4_XS", "iq4", 32, "i8"),
    "IQ3_XXS": _of_grid("IQ3_XXS", "i6", 32),
    "IQ3_S": _of_grid("IQ3_S", "u4", 32, symmetric=False),
    "IQ2_XXS": _of_grid("IQ2_XXS", "i8", 32),
    "IQ2_XS": _of_grid("IQ2_XS", "i8", 16),
    "IQ2_S": _of_grid("IQ2_S", "i8", 16),
    "IQ1_S": _of_grid("IQ1_S", "u2", 32, symmetric=False),
    "IQ1_M": _of_grid("IQ1_M", "u4", 16, symmetric=False),
    "MXFP4": Scheme(4, 32, codes="e2m1", scales="e8m0", label="MXFP4"),
    "NVFP4": Scheme(4, 16, codes="e2m1", scales="e4m3", label="NVFP4"),
}
# Those of safetensors that are not integers.
MXFP4 = GGUF_SCHEMES["MXFP4"]
NVFP4 = Scheme(4, 16, True, "e2m1", "e4m3", "f32", 0, "NVFP4")
MXFP8 = Scheme(8, 32, True, "e4m3", "e8m0", label="MXFP8")


def fp8_scheme(group_size: int) -> Scheme:
    """Floats of 8 bits (E4M3) with float32 scales for groups of a row, or for whole rows (0)."""
    label = f"fp8-g{group_size}" if group_size else "fp8"
    return Scheme(8, group_size, True, "e4m3", "f32", label=label)


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
