"""The `quantization_config` of weights that are floats of 8 or 4 bits. Free of torch.

"fp8" (DeepSeek, Qwen, GLM, AutoFP8): E4M3 with a scale for blocks of rows and columns, or for all of a
weight. "fbgemm_fp8": E4M3 with a scale for each row. "modelopt" (NVIDIA): E4M3 with one scale or one
for each row, or E2M1 (NVFP4). "mxfp4" (gpt-oss): E2M1 with powers of two as scales.

What is not here: scales of activations, static or dynamic. Activations stay as they are.

Source: `FineGrainedFP8Config`, `FbgemmFp8Config` and `Mxfp4Config` of transformers; the export of
NVIDIA's modelopt (`convert_hf_config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from base.errors import InputError
from weights.formats.quant_declared import WAY_OUT, QuantConfig, block_of, names_of
from weights.schemes import MXFP4, NVFP4, Scheme, fp8_scheme

_MODELOPT = {
    "FP8": fp8_scheme(0),
    "FP8_PER_CHANNEL_PER_TOKEN": fp8_scheme(0),
    "MXFP8": fp8_scheme(32),
    "NVFP4": NVFP4,
    "W4A16_NVFP4": NVFP4,
}
_MIXED = "MIXED_PRECISION"  # modules differ: `quantized_layers` says how


def read_fp8(found: Mapping[str, Any], where: str) -> QuantConfig:
    form, block = found.get("fmt", "e4m3"), found.get("weight_block_size")
    if form != "e4m3":
        raise InputError(
            f"{where} has fmt {str(form)[:40]!r}, which is not supported; supported is e4m3: {WAY_OUT}"
        )
    rows, columns = (0, 0) if block is None else block_of(block, f"{where}.weight_block_size")
    ignored = names_of(found, "modules_to_not_convert", where) | names_of(
        found, "ignored_layers", where
    )
    return QuantConfig(where, "fp8", "", (fp8_scheme(columns),), ignored, block_rows=rows)


def read_fbgemm(found: Mapping[str, Any], where: str) -> QuantConfig:
    ignored = names_of(found, "modules_to_not_convert", where)
    return QuantConfig(where, "fbgemm_fp8", "", (fp8_scheme(0),), ignored)


def read_mxfp4(found: Mapping[str, Any], where: str) -> QuantConfig:
    ignored = names_of(found, "modules_to_not_convert", where)
    return QuantConfig(where, "mxfp4", "", (MXFP4,), ignored)


def read_modelopt(found: Mapping[str, Any], where: str) -> QuantConfig | None:
    """From config.json, or from ModelOpt's own file, in which all is under "quantization"."""
    about = found.get("quantization", found)
    if not isinstance(about, Mapping):
        raise InputError(f"{where} has quantization that is not an object; download it again")
    modules = [about]
    if about.get("quant_algo") == _MIXED:
        layers = about.get("quantized_layers")
        if not isinstance(layers, Mapping) or not layers:
            raise InputError(f"{where} must have an object 'quantized_layers' that is not empty")
        modules = list(layers.values())
    elif about.get("quant_algo") is None and about.get("kv_cache_quant_algo"):
        return None  # only the cache is quantized; the weights are plain
    schemes = tuple(dict.fromkeys(_modelopt_scheme(each, where) for each in modules))
    ignored = names_of(about, "exclude_modules", where) | names_of(about, "ignore", where)
    return QuantConfig(where, "modelopt", "", schemes, ignored)


def _modelopt_scheme(about: Any, where: str) -> Scheme:
    algorithm = about.get("quant_algo") if isinstance(about, Mapping) else None
    scheme = _MODELOPT.get(algorithm) if isinstance(algorithm, str) else None
    if scheme is None:
        raise InputError(
            f"{where} has quant_algo {str(algorithm)[:40]!r}, which is not supported; supported are "
            f"{', '.join(_MODELOPT)}: {WAY_OUT}"
        )
    size = about.get("group_size")
    if scheme.group_size and size not in (None, scheme.group_size):
        raise InputError(
            f"{where} has group_size {str(size)[:40]}; {algorithm} has {scheme.group_size}: {WAY_OUT}"
        )
    return scheme
