"""Errors about what the user asked of the launcher."""


class LaunchError(ValueError):
    """A request that this machine cannot meet: the message says the value, the rule and the way out."""

    exit_code = 2
