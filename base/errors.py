"""What the user gave is wrong: the errors that end a command with exit code 2."""

from __future__ import annotations

import difflib


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what, why, and what to do.

    `exit_code` is what the command ends with; the launcher reads it without knowing this class.
    """

    exit_code = 2


class LaunchError(ValueError):
    """A request that this machine cannot meet: the message says the value, the rule and the way out."""

    exit_code = 2


def nearest(key: str, keys: list[str]) -> str:
    """ ", did you mean ...?" where one of `keys` is near, else nothing."""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
