"""The `quantization_config` of a Hugging Face `config.json`. Free of torch.

A reader per method: those of integers are here, compressed-tensors' and those of floats have files of
their own (quant_config_compressed, quant_config_floats). Patterns ("re:...") are not evaluated: they
come with the file and are not trusted. The stored tensors show which modules are quantized, and these
must have one of the schemes that the config declares. Before config.json had the key, the libraries
wrote a file of their own beside it; that file is read if config.json has no such key.

What is not here: how activations and the KV cache were quantized. They are not quantized here, which is
more exact; the cache scales in the files are recognized by their names.

Source: the `quantize_config.json` of AutoGPTQ and GPTQModel; AutoAWQ's `AwqConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from base.errors import InputError
from weights.files import read_json
from weights.formats.quant_config_compressed import read_compressed
from weights.formats.quant_config_floats import read_fbgemm, read_fp8, read_modelopt, read_mxfp4
from weights.formats.quant_declared import (
    WAY_OUT,
    QuantConfig,
    bits_of,
    flag_of,
    group_of,
    names_of,
)
from weights.schemes import Scheme

KEYS = ("quantization_config", "compression_config")
# Ends of names that no plain weight has.
MARKS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", "_proj_blocks")
# AutoGPTQ's, AutoAWQ's, ModelOpt's.
_BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_OF_AWQ = {"w_bit", "q_group_size", "zero_point"}  # keys that no file of GPTQ has
_CACHE_SCALE = re.compile(
    r".*\.(self_attn|self_attention|attn|attention)\.(attn\.|(q|k|v|qkv)_proj\.)?"
    r"(q|k|v|kv|prob|prob_output)_(scale|zero_point)|.*\.(q|k|v|qkv)_proj\.output_(scale|zero_point)"
)


def read_quant_config(config: Mapping[str, Any], source: str) -> QuantConfig | None:
    """The quantization that a config declares, or None. `source` is the config's file. Raises
    InputError if it is not supported."""
    found = declared(config)
    if found is None:
        return None
    where = f"{source}: quantization_config"
    if not isinstance(found, Mapping):
        raise InputError(f"{where} must be an object, not {type(found).__name__}")
    method = found.get("quant_method")
    read = _READERS.get(method) if isinstance(method, str) else None
    if read is None:
        raise InputError(
            f"{where} has quant_method {str(method)[:100]!r}, which is not supported; supported are "
            f"{', '.join(_READERS)}: {WAY_OUT}"
        )
    return read(found, where)


def declared(config: Mapping[str, Any]) -> Any:
    """What a config.json says about quantization, not checked; None if nothing."""
    return next((config[key] for key in KEYS if config.get(key) is not None), None)


def with_file_beside(
    config: Mapping[str, Any], folder: Path, names: Iterable[str]
) -> tuple[Mapping[str, Any], str]:
    """`config` with the `quantization_config` for weights of these `names`, and the file that declares
    it: config.json, or else the file that quantization libraries wrote beside it. Raises InputError."""
    if declared(config) is None and any(name.endswith(MARKS) for name in names):
        for file in (folder / name for name in _BESIDE):
            if file.is_file():
                found = read_json(file)
                method = found.get("quant_method") or _method_of(found)
                return {**config, KEYS[0]: {**found, "quant_method": method}}, str(file)
    return config, str(folder / "config.json")


def _method_of(found: Mapping[str, Any]) -> str:
    """The method of a file beside the config that does not name it."""
    if "quantization" in found:
        return "modelopt"
    return "awq" if _OF_AWQ & found.keys() else "gptq"


def is_cache_scale(name: str) -> bool:
    """Whether a stored tensor is a scale of a quantized KV cache, or of attention with one."""
    return _CACHE_SCALE.fullmatch(name) is not None


def _gptq(found: Mapping[str, Any], where: str) -> QuantConfig:
    form = found.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise InputError(
            f"{where} has checkpoint_format {str(form)[:100]!r}, which is not supported; supported are "
            f"gptq and gptq_v2: {WAY_OUT}"
        )
    declared = [(found, where), *_exceptions(found, where)]
    schemes = tuple(dict.fromkeys(_gptq_scheme(each, at) for each, at in declared))
    reordered = any(flag_of(each, "desc_act", False, at) for each, at in declared)
    return QuantConfig(where, "gptq", "", schemes, frozenset(), reordered, form == "gptq")


def _gptq_scheme(found: Mapping[str, Any], where: str) -> Scheme:
    bits, size = bits_of(found.get("bits"), (4, 8), where), found.get("group_size")
    return Scheme(bits, 0 if size == -1 else group_of(size, where), flag_of(found, "sym", True, where))


def _exceptions(found: Mapping[str, Any], where: str) -> list[tuple[Mapping[str, Any], str]]:
    """The settings of GPTQModel's `dynamic` for modules that match a pattern, each with its place in
    the config, for messages. "-:PATTERN" excludes modules; their tensors show which."""
    dynamic = found.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise InputError(f"{where} has dynamic that is not an object; download it again")
    exceptions: list[tuple[Mapping[str, Any], str]] = []
    for pattern, settings in dynamic.items():
        if pattern.startswith("-:"):
            continue
        at = f"{where}.dynamic[{pattern[:60]!r}]"
        if not isinstance(settings, Mapping):
            raise InputError(f"{at} must be an object of settings for some modules")
        for key in ("format", "checkpoint_format", "quant_method", "method", "pack_dtype"):
            if key in settings and settings[key] != found.get(key):
                raise InputError(
                    f"{at} has {key} {str(settings[key])[:40]!r}, which differs from the model's; that "
                    f"is not supported: {WAY_OUT}"
                )
        exceptions.append(({**found, **settings}, at))
    return exceptions


def _awq(found: Mapping[str, Any], where: str) -> QuantConfig:
    version = found.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise InputError(
            f"{where} has version {str(version)[:40]!r}; only gemm is supported: {WAY_OUT}"
        )
    if not flag_of(found, "zero_point", True, where):
        raise InputError(f"{where} has zero_point false, which is not supported: {WAY_OUT}")
    bits = bits_of(found.get("bits", found.get("w_bit")), (4,), where)
    size = found.get("group_size", found.get("q_group_size"))
    scheme = Scheme(bits, 0 if size == -1 else group_of(size, where), symmetric=False)
    return QuantConfig(where, "awq", "", (scheme,), names_of(found, "modules_to_not_convert", where))


_READERS: dict[str, Callable[[Mapping[str, Any], str], QuantConfig | None]] = {
    "compressed-tensors": read_compressed,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm,
    "modelopt": read_modelopt,
    "mxfp4": read_mxfp4,
}
