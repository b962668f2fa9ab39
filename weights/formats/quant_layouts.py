"""Which tensors of a file are a quantized module, and the scheme that its shapes mean. Free of torch:
the outline and the readers of each layout share it.

What is not here: where the bits are (weights.formats.quant_gptq, quant_awq, quant_compressed,
quant_fp8, quant_fp4, quant_mxfp4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weights.formats.quant_declared import QuantConfig
from weights.schemes import MXFP8, Scheme

Shape = tuple[int, ...]
Stored = tuple[str, Shape]  # dtype (in safetensors' spelling) and shape

POWERS = ("F8_E8M0", "U8")  # the dtypes of powers of two, stored as their exponents
# A module with one of these is quantized.
_SIGNS = frozenset({"qweight", "weight_packed", "weight_scale", "weight_scale_inv"})
# gpt-oss stores these matrices of all experts as one tensor; the rows of several alternate.
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def is_quantized(parts: Mapping[str, Stored]) -> bool:
    """Whether a module with these tensors, by the last components of their names, has a quantized
    weight."""
    return bool(_SIGNS & parts.keys())


def scheme_of(declared: QuantConfig, parts: Mapping[str, Stored]) -> Scheme | None:
    """The scheme in which a module's weight can stay quantized; None if it can only be dequantized, or
    if the tensors are not what the config declares (the reader says why)."""
    shapes = {end: shape for end, (_, shape) in parts.items()}
    if declared.method == "awq":
        bits = declared.schemes[0].bits
        return declared.fitting(bits, shapes["scales"][0], shapes["qweight"][0])
    if declared.method == "gptq":
        if declared.reordered and "g_idx" in parts:
            return None
        bits = declared.bits_of(shapes["qzeros"], shapes["qweight"][1])
        return declared.fitting(bits, shapes["scales"][0], shapes["qweight"][0] * 32 // bits)
    name = "weight_packed" if "weight_packed" in parts else "weight"
    dtype, stored = parts[name]
    if dtype == "F8_E4M3":
        found = fp8_grid(declared, stored, parts[scale_name(parts)])
        return None if found is None else found[0]
    if dtype == "U8":
        return fp4_scheme(declared, stored, shapes["weight_scale"])
    if "weight_g_idx" in parts:
        return None
    scales, zeros = shapes["weight_scale"], "weight_zero_point" in parts
    groups = scales[1] if len(scales) == 2 else 1
    if name == "weight":
        return declared.fitting(8, groups, stored[1], zeros)
    width = stored[1] * 32
    fitting = (declared.fitting(bits, groups, width // bits, zeros) for bits in (4, 8))
    return next((scheme for scheme in fitting if scheme is not None), None)


def scale_name(parts: Mapping[str, object]) -> str:
    """The name of the scales of a weight in E4M3. Both names mean a factor of the weight."""
    return "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"


def fp8_grid(declared: QuantConfig, weight: Shape, scales: Stored) -> tuple[Scheme, int] | None:
    """The scheme of a weight in E4M3, and how many of its rows share a row of scales; None if the
    shapes do not fit what is declared. The last block of rows and that of columns may be smaller."""
    dtype, shape = scales
    if len(weight) != 2 or len(shape) > 2:
        return None
    n, k = weight
    rows, groups = shape if len(shape) == 2 else (shape[0] if shape else 1, 1)
    scheme = declared.fitting(8, groups, k, floats=True)
    if scheme is None:
        return None
    if scheme.group_size == MXFP8.group_size and dtype in POWERS and k % MXFP8.group_size == 0:
        scheme = MXFP8  # which has scales of a byte
    if rows == n:
        return scheme, 1
    if declared.block_rows and rows == -(-n // declared.block_rows):
        return scheme, declared.block_rows
    return (scheme, n) if rows == 1 and not scheme.group_size else None


def fp4_scheme(declared: QuantConfig, packed: Shape, scales: Shape) -> Scheme | None:
    """The scheme of a weight in E2M1, two numbers a byte; None if the shapes do not fit what is
    declared."""
    if len(packed) != 2 or len(scales) != 2 or scales[0] != packed[0]:
        return None
    return declared.fitting(4, scales[1], 2 * packed[1], floats=True)


def expert_names(module: str, stack: str, count: int, end: str) -> Iterator[tuple[int, int, str]]:
    """The canonical names of the tensors in gpt-oss's stack of `count` experts: yields the expert, the
    first of its rows (of every second, if there are two), and the name. `end`: "weight" or "bias"."""
    for expert in range(count):
        for first, name in enumerate(EXPERTS[stack]):
            yield expert, first, f"{module}.{expert}.{name}.{end}"
