"""Typed access to the keys of a settings file. Free of torch.

Defaults are not given where a key is read: they come from a table (`models.defaults`) with an entry for
every key of a family. A key without an entry raises KeyError, which is a bug in Yoke and fails the
tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from base.errors import InputError

REQUIRED = "required"  # in a table of defaults: the key must be in the file


class Keys:
    """The keys of a file. `source` names the file in errors; `defaults` has an entry for every key.

    null in a file is read as None. It means "none" or "computed from other keys" for keys whose default
    is None, and is refused for others. All methods raise InputError for a value of the wrong type or
    range, and for a missing key that is REQUIRED.
    """

    def __init__(self, values: Mapping[str, Any], source: str, defaults: Mapping[str, Any]) -> None:
        self.values = values
        self.source = source
        self.defaults = defaults

    def value(self, key: str) -> Any:
        default = self.defaults[key]
        if key in self.values:
            return self.values[key]
        if default is REQUIRED:
            raise InputError(f"{self.source}: {key} is missing, and it has no default")
        return default

    def integer(self, key: str, if_none: int | None = None) -> int:
        value = self.value(key)
        value = if_none if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{self.source}: {key} must be an integer, not {value!r}")
        if abs(value) >= 1 << 48:  # larger than any size, and too large to compute with
            raise InputError(f"{self.source}: {key} must be below 2^48, not {str(value)[:100]}")
        return value

    def size(self, key: str, most: int, if_none: int | None = None) -> int:
        """An integer from 0 to `most`."""
        value = self.integer(key, if_none)
        if not 0 <= value <= most:
            raise InputError(f"{self.source}: {key}={value}: must be from 0 to {most}")
        return value

    def number(self, key: str, if_none: float | None = None) -> float:
        value = self.value(key)
        value = if_none if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{self.source}: {key} must be a number above 0, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value not in (None, False, True):
            raise InputError(f"{self.source}: {key} must be true or false, not {value!r}")
        return bool(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.value(key)
        if not isinstance(value, list) or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in value
        ):
            raise InputError(
                f"{self.source}: {key} must be a list of numbers above 0, not {str(value)[:100]}"
            )
        return tuple(float(x) for x in value)

    def only(self, key: str, allowed: tuple[Any, ...]) -> Any:
        """The value, which must be one of `allowed`."""
        value = self.value(key)
        if value not in allowed:
            names = ", ".join(repr(each) for each in allowed if each is not None)
            raise InputError(f"{self.source}: {key}={value!r} is not supported; supported: {names}")
        return value
