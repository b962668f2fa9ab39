"""Errors about what the user gave."""


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what, why, and what to do.

    `exit_code` is what the command ends with; the launcher reads it without knowing this class.
    """

    exit_code = 2
