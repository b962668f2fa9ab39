"""What a `quantization_config` declares, and the checks of its values that all methods share. Free of
torch.

What is not here: which keys each method has (weights.formats.quant_config, quant_config_floats), and
how the numbers are stored (weights.formats.quant_layouts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from base.errors import InputError
from weights.schemes import MIN_GROUP, Scheme

_MAX_GROUP = 1 << 16
_FLOATS = ("e4m3", "e2m1")  # codes of floats; all others are integers
WAY_OUT = "take the model unquantized, or quantized in one of these ways"


@dataclass(frozen=True)
class QuantConfig:
    """`method` is one of those of quant_config; `format`, for compressed-tensors, one of FORMATS or
    MIXED of quant_config_compressed, else "". A module has one of `schemes`, unless it is in `ignored`.
    `reordered`: columns were quantized in another order than they are stored in (act-order).
    `minus_one`: zero points are stored minus 1. `block_rows`: rows that share the scales of their
    groups (0: each row has its own). `source` is for messages."""

    source: str
    method: str
    format: str
    schemes: tuple[Scheme, ...]
    ignored: frozenset[str] = frozenset()
    reordered: bool = False
    minus_one: bool = False
    block_rows: int = 0

    def fitting(
        self, bits: int, groups: int, k: int, has_zeros: bool = True, floats: bool = False
    ) -> Scheme | None:
        """The declared scheme of a module whose rows of `k` numbers, integers or `floats`, have
        `groups` groups; None if no scheme fits."""
        fitting = [
            scheme
            for scheme in self.schemes
            if scheme.bits == bits
            and (scheme.code_name in _FLOATS) == floats
            and k > 0
            and groups == -(-k // (scheme.group_size or k))
            and k % _whole_columns(scheme) == 0
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


def _whole_columns(scheme: Scheme) -> int:
    """A stored row has a multiple of this many numbers. The last block of FP8 may be smaller."""
    return 1 if scheme.code_name == "e4m3" else scheme.group_size or MIN_GROUP


def bits_of(value: Any, allowed: tuple[int, ...], where: str) -> int:
    if type(value) is not int or value not in allowed:
        raise InputError(
            f"{where} has {str(value)[:40]} bits; supported are {' and '.join(map(str, allowed))}: "
            + WAY_OUT
        )
    return value


def group_of(value: Any, where: str) -> int:
    if type(value) is not int or not MIN_GROUP <= value <= _MAX_GROUP or value % MIN_GROUP:
        raise InputError(
            f"{where} has group_size {str(value)[:40]}; supported are multiples of {MIN_GROUP}, and -1 "
            f"(whole rows): {WAY_OUT}"
        )
    return value


def block_of(value: Any, where: str) -> tuple[int, int]:
    """The rows and columns that share a scale."""
    sizes = value if isinstance(value, list) and len(value) == 2 else [None, None]
    rows, columns = sizes
    if type(rows) is not int or not 1 <= rows <= _MAX_GROUP:
        raise InputError(
            f"{where} has blocks of {str(value)[:40]}; they must be a number of rows and one of columns"
        )
    return rows, group_of(columns, where)


def flag_of(found: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = found.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise InputError(f"{where} has {key} {str(value)[:40]!r}; it must be true or false")
    return value


def names_of(found: Mapping[str, Any], key: str, where: str) -> frozenset[str]:
    names = found.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} has {key} that is not a list of names")
    return frozenset(names)
