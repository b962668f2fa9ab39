"""The errors for wrong input of the user: they end a command with exit code 2."""

from __future__ import annotations

import difflib


class InputError(ValueError):
    """Input of the user that cannot be used: the message says what, why, and what to do.

    `exit_code` is the exit code of the command; the launcher reads it without knowing this class.
    """

    exit_code = 2


class LaunchError(ValueError):
    """A request that this machine cannot meet: the message has the value, the rule and what to do."""

    exit_code = 2


def closest(key: str, keys: list[str]) -> str:
    """The one of `keys` that is most similar to `key`; "" if none is."""
    return next(iter(difflib.get_close_matches(key, keys, n=1, cutoff=0.5)), "")


def nearest(key: str, keys: list[str]) -> str:
    """ ", did you mean ...?" if one of `keys` is similar to `key`, else ""."""
    found = closest(key, keys)
    return f", did you mean {found!r}?" if found else ""
