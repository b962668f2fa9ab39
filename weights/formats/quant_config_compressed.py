"""The `quantization_config` of compressed-tensors (llm-compressor). Free of torch.

Each group of modules declares how its weights are quantized. Patterns of modules ("re:...") are not
evaluated: they come with the file and are not trusted.

Source: `QuantizationConfig`, `QuantizationArgs` and the compressors of the compressed-tensors library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from base.errors import InputError
from weights.formats.quant_declared import (
    WAY_OUT,
    QuantConfig,
    bits_of,
    block_of,
    flag_of,
    group_of,
    names_of,
)
from weights.schemes import MXFP4, NVFP4, Scheme, fp8_scheme

_FP4 = {"nvfp4-pack-quantized": NVFP4, "mxfp4-pack-quantized": MXFP4}
# What each format stores.
_KINDS_OF = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
    "mxfp8-quantized": ("float",),
} | dict.fromkeys(_FP4, ("float",))
FORMATS = tuple(_KINDS_OF)
MIXED = "mixed-precision"  # each group of modules has one of FORMATS
_MAX_GROUPS_OF_MODULES = 64


def read_compressed(found: Mapping[str, Any], where: str) -> QuantConfig | None:
    if found.get("kv_cache_scheme") is not None and not found.get("config_groups"):
        return None  # only the cache is quantized; the weights are plain
    form = _format(found.get("format"), (*FORMATS, MIXED), where)
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not 1 <= len(groups) <= _MAX_GROUPS_OF_MODULES:
        raise InputError(f"{where} must have an object 'config_groups' that is not empty")
    schemes, reordered = [], False
    heights: set[int] = set()  # rows of the declared blocks
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        at = f"{where}.config_groups.{name[:40]}"
        if not isinstance(weights, Mapping):
            raise InputError(f"{at}.weights must be an object that says how weights are quantized")
        own = _format(group.get("format"), FORMATS, at) if form == MIXED else form
        schemes.append(_compressed_scheme(weights, own, f"{at}.weights"))
        reordered |= weights.get("actorder") in ("group", True)
        if _is_block(weights):
            heights.add(block_of(weights.get("block_structure"), f"{at}.weights")[0])
    if len(heights) > 1:
        raise InputError(f"{where} has blocks of {sorted(heights)} rows; only one size is supported")
    ignored = names_of(found, "ignore", where)
    return QuantConfig(
        where, "compressed-tensors", form, tuple(dict.fromkeys(schemes)), ignored, reordered,
        block_rows=max(heights, default=0),
    )  # fmt: skip


def _is_block(weights: Mapping[str, Any]) -> bool:
    return weights.get("strategy") == "block"


def _compressed_scheme(weights: Mapping[str, Any], form: str, where: str) -> Scheme:
    """The scheme of a group of modules; `form` is one of FORMATS."""
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    kinds = _KINDS_OF[form]
    if kind not in kinds:
        raise InputError(
            f"{where} has type {str(kind)[:40]!r}; {form} supports {' and '.join(kinds)}: {WAY_OUT}"
        )
    symmetric = flag_of(weights, "symmetric", True, where)
    if kind == "float" and not symmetric:
        raise InputError(f"{where} has floats that are not symmetric: {WAY_OUT}")
    if form in _FP4:
        bits_of(weights.get("num_bits"), (4,), where)
        scheme, size = _FP4[form], weights.get("group_size")
        if size != scheme.group_size:
            raise InputError(
                f"{where} has group_size {str(size)[:40]}; {form} has {scheme.group_size}: {WAY_OUT}"
            )
        return scheme
    known = ("channel", "tensor", "group", *(("block",) if kind == "float" else ()))
    if strategy not in (*known, None):
        raise InputError(
            f"{where} has strategy {str(strategy)[:40]!r}; supported are {', '.join(known)}"
        )
    bits = bits_of(weights.get("num_bits"), (4, 8) if form == "pack-quantized" else (8,), where)
    size = 0
    if _is_block(weights):
        size = block_of(weights.get("block_structure"), where)[1]
    elif strategy not in ("channel", "tensor") and weights.get("group_size") != -1:
        size = group_of(weights.get("group_size"), where)
    return fp8_scheme(size) if kind == "float" else Scheme(bits, size, symmetric)


def _format(form: Any, allowed: tuple[str, ...], where: str) -> str:
    if not isinstance(form, str) or form not in allowed:
        raise InputError(
            f"{where} has format {str(form)[:100]!r}, which is not supported; supported are "
            f"{', '.join(allowed)}: {WAY_OUT}"
        )
    return form
