"""Keys of a file of settings, read with their types. Free of torch.

What holds where the file has no entry is not said where a key is read: it comes from a table
(`models.defaults`) that has an entry for every key of a family. A key without one raises KeyError,
which is a mistake of ours and fails the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from base.errors import InputError

REQUIRED = "required"  # in a table: nothing can be read without this key


class Keys:
    """The keys of a file; `source` is what errors call it, `defaults` what holds where it has none.

    null in a file is None: "none" or "computed from others" for keys of which the default is None, too,
    and refused for others.
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
            raise InputError(f"{self.source}: {key} is missing, and nothing else says it")
        return default

    def integer(self, key: str, if_none: int | None = None) -> int:
        value = self.value(key)
        value = if_none if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{self.source}: {key} must be an integer, not {value!r}")
        if abs(value) >= 1 << 48:  # no size of anything, and too large to be computed with
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
        """Refuse a value that is not understood."""
        value = self.value(key)
        if value not in allowed:
            names = ", ".join(repr(each) for each in allowed if each is not None)
            raise InputError(f"{self.source}: {key}={value!r} is not supported; supported: {names}")
        return value
