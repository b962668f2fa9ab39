"""What can go wrong between ranks."""


class CommError(RuntimeError):
    """A group could not be made, or a peer did not answer in time."""


class BuildError(CommError):
    """The shared-memory extension could not be compiled; the message holds what the compiler said."""


class SpaceError(CommError):
    """/dev/shm is too small: the message says what is there, what is needed and how to get it."""

    exit_code = 2
