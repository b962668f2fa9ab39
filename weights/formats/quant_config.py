"""The `quantization_config` of a Hugging Face `config.json`. Free of torch.

Three methods are supported: "compressed-tensors" (pack-quantized, int-quantized, or both), "gptq" and
"awq". Patterns ("re:...") are not evaluated: they come with the file and are not trusted. The stored
tensors show which modules are quantized, and these must have one of the schemes that the config
declares. Before config.json had the key, the libraries wrote a file of their own beside it; that file
is read if config.json has no such key.

What is not here: how activations and the KV cache were quantized. They are not quantized here, which is
more exact; the cache scales in the files are recognized by their names.

Source: `QuantizationConfig` of the compressed-tensors library; the `quantize_config.json` of AutoGPTQ
and GPTQModel; AutoAWQ's `AwqConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import InputError
from weights.files import read_json
from weights.schemes import MIN_GROUP, Scheme

METHODS = ("compressed-tensors", "gptq", "awq")
FORMATS = ("pack-quantized", "int-quantized")
MIXED = "mixed-precision"  # each group of modules has one of FORMATS
_MAX_GROUP = 1 << 16
_MAX_GROUPS_OF_MODULES = 64
_KEYS = ("quantization_config", "compression_config")
MARKS = (".qweight", ".weight_packed")  # ends of names that no plain weight has
_BESIDE = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's, AutoAWQ's
_OF_AWQ = {"w_bit", "q_group_size", "zero_point"}  # keys that no file of GPTQ has
_CACHE_SCALE = re.compile(
    r".*\.(self_attn|self_attention|attn|attention)\.(attn\.|(q|k|v|qkv)_proj\.)?"
    r"(q|k|v|kv|prob|prob_output)_(scale|zero_point)|.*\.(q|k|v|qkv)_proj\.output_(scale|zero_point)"
)
_WAY_OUT = "take the model unquantized, or quantized in one of these ways"


@dataclass(frozen=True)
class QuantConfig:
    """`method` is one of METHODS; `format` is one of FORMATS, or MIXED, for compressed-tensors, else
    "". A module has one of `schemes`, unless it is in `ignored`. `reordered`: columns were quantized in
    another order than they are stored in (act-order). `minus_one`: zero points are stored minus 1.
    `source` is for messages."""

    source: str
    method: str
    format: str
    schemes: tuple[Scheme, ...]
    ignored: frozenset[str] = frozenset()
    reordered: bool = False
    minus_one: bool = False

    def fitting(self, bits: int, groups: int, k: int, has_zeros: bool) -> Scheme | None:
        """The declared scheme of a module whose rows of `k` numbers have `groups` groups; None if no
        scheme fits."""
        fitting = [
            scheme
            for scheme in self.schemes
            if scheme.bits == bits
            and groups * (scheme.group_size or k) == k
            and k % MIN_GROUP == 0
            and (has_zeros or scheme.symmetric)
        ]
        # Prefer the asymmetric scheme: it also holds for zero points that are all in the middle.
        return min(fitting, key=lambda scheme: scheme.symmetric, default=None)

    def bits_of(self, zeros: tuple[int, ...], n: int) -> int:
        """The bits of a GPTQ module with `n` outputs, by the shape of its stored zero points; if no
        scheme has these bits, those of the first scheme."""
        stored = zeros[-1] * 32 // n if zeros and n else 0
        known = [scheme.bits for scheme in self.schemes]
        return stored if stored in known else known[0]

    @property
    def named(self) -> str:
        """The declared method and schemes, for messages."""
        form = f" ({self.format})" if self.format else ""
        return f"{self.method}{form}, {' or '.join(scheme.name for scheme in self.schemes)}"


def read_quant_config(config: Mapping[str, Any], source: str) -> QuantConfig | None:
    """The quantization that a config declares, or None. `source` is the config's file. Raises
    InputError if it is not supported."""
    found = _declared(config)
    if found is None:
        return None
    where = f"{source}: quantization_config"
    if not isinstance(found, Mapping):
        raise InputError(f"{where} must be an object, not {type(found).__name__}")
    method = found.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(found, where)
    if method == "gptq":
        return _gptq(found, where)
    if method == "awq":
        return _awq(found, where)
    raise InputError(
        f"{where} has quant_method {str(method)[:100]!r}, which is not supported; supported are "
        f"{', '.join(METHODS)}: {_WAY_OUT}"
    )


def _declared(config: Mapping[str, Any]) -> Any:
    return next((config[key] for key in _KEYS if config.get(key) is not None), None)


def with_file_beside(
    config: Mapping[str, Any], folder: Path, names: Iterable[str]
) -> tuple[Mapping[str, Any], str]:
    """`config` with the `quantization_config` for weights of these `names`, and the file that declares
    it: config.json, or else the file that quantization libraries wrote beside it. Raises InputError."""
    if _declared(config) is None and any(name.endswith(MARKS) for name in names):
        for file in (folder / name for name in _BESIDE):
            if file.is_file():
                found = read_json(file)
                method = found.get("quant_method") or ("awq" if _OF_AWQ & found.keys() else "gptq")
                return {**config, _KEYS[0]: {**found, "quant_method": method}}, str(file)
    return config, str(folder / "config.json")


def is_cache_scale(name: str) -> bool:
    """Whether a stored tensor is a scale of a quantized KV cache, or of attention with one."""
    return _CACHE_SCALE.fullmatch(name) is not None


def _compressed(found: Mapping[str, Any], where: str) -> QuantConfig | None:
    if found.get("kv_cache_scheme") is not None and not found.get("config_groups"):
        return None  # only the cache is quantized; the weights are plain
    form = _format(found.get("format"), (*FORMATS, MIXED), where)
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not 1 <= len(groups) <= _MAX_GROUPS_OF_MODULES:
        raise InputError(f"{where} must have an object 'config_groups' that is not empty")
    schemes, reordered = [], False
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        at = f"{where}.config_groups.{name[:40]}.weights"
        if not isinstance(weights, Mapping):
            raise InputError(f"{at} must be an object that says how weights are quantized")
        if weights.get("type", "int") != "int":
            raise InputError(
                f"{at} has type {str(weights['type'])[:40]!r}; only int is supported: {_WAY_OUT}"
            )
        strategy = weights.get("strategy")
        own = form
        if form == MIXED:
            own = _format(group.get("format"), FORMATS, f"{where}.config_groups.{name[:40]}")
        whole_rows = strategy in ("channel", "tensor") or weights.get("group_size") == -1
        if strategy not in ("channel", "tensor", "group", None):
            raise InputError(
                f"{at} has strategy {str(strategy)[:40]!r}; supported are channel, tensor and group"
            )
        bits = _bits(weights.get("num_bits"), (8,) if own == "int-quantized" else (4, 8), at)
        size = 0 if whole_rows else _group(weights.get("group_size"), at)
        schemes.append(Scheme(bits, size, _flag(weights, "symmetric", True, at)))
        reordered |= weights.get("actorder") in ("group", True)
    ignored = _names(found, "ignore", where)
    return QuantConfig(where, "compressed-tensors", form, tuple(schemes), ignored, reordered)


def _format(form: Any, allowed: tuple[str, ...], where: str) -> str:
    if not isinstance(form, str) or form not in allowed:
        raise InputError(
            f"{where} has format {str(form)[:100]!r}, which is not supported; supported are "
            f"{', '.join(allowed)}: {_WAY_OUT}"
        )
    return form


def _gptq(found: Mapping[str, Any], where: str) -> QuantConfig:
    form = found.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise InputError(
            f"{where} has checkpoint_format {str(form)[:100]!r}, which is not supported; supported are "
            f"gptq and gptq_v2: {_WAY_OUT}"
        )
    declared = [(found, where), *_exceptions(found, where)]
    schemes = tuple(dict.fromkeys(_gptq_scheme(each, at) for each, at in declared))
    reordered = any(_flag(each, "desc_act", False, at) for each, at in declared)
    return QuantConfig(where, "gptq", "", schemes, frozenset(), reordered, form == "gptq")


def _gptq_scheme(found: Mapping[str, Any], where: str) -> Scheme:
    bits, size = _bits(found.get("bits"), (4, 8), where), found.get("group_size")
    return Scheme(bits, 0 if size == -1 else _group(size, where), _flag(found, "sym", True, where))


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
                    f"is not supported: {_WAY_OUT}"
                )
        exceptions.append(({**found, **settings}, at))
    return exceptions


def _awq(found: Mapping[str, Any], where: str) -> QuantConfig:
    version = found.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise InputError(
            f"{where} has version {str(version)[:40]!r}; only gemm is supported: {_WAY_OUT}"
        )
    if not _flag(found, "zero_point", True, where):
        raise InputError(f"{where} has zero_point false, which is not supported: {_WAY_OUT}")
    bits = _bits(found.get("bits", found.get("w_bit")), (4,), where)
    size = found.get("group_size", found.get("q_group_size"))
    scheme = Scheme(bits, 0 if size == -1 else _group(size, where), symmetric=False)
    return QuantConfig(where, "awq", "", (scheme,), _names(found, "modules_to_not_convert", where))


def _bits(value: Any, allowed: tuple[int, ...], where: str) -> int:
    if type(value) is not int or value not in allowed:
        raise InputError(
            f"{where} has {str(value)[:40]} bits; supported are {' and '.join(map(str, allowed))}: "
            + _WAY_OUT
        )
    return value


def _group(value: Any, where: str) -> int:
    if type(value) is not int or not MIN_GROUP <= value <= _MAX_GROUP or value % MIN_GROUP:
        raise InputError(
            f"{where} has group_size {str(value)[:40]}; supported are multiples of {MIN_GROUP}, and -1 "
            f"(whole rows): {_WAY_OUT}"
        )
    return value


def _flag(found: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = found.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise InputError(f"{where} has {key} {str(value)[:40]!r}; it must be true or false")
    return value


def _names(found: Mapping[str, Any], key: str, where: str) -> frozenset[str]:
    names = found.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} has {key} that is not a list of names")
    return frozenset(names)
