"""The terminal of a chat: the modes it is in, and putting them back whatever happened.

Two processes do that for each other: the chat's own when the launcher was killed, the launcher when the
chat was. Neither touches a terminal that is somebody else's at the moment: a shell whose job has died
puts its modes back itself.
"""

from __future__ import annotations

import os
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

Modes = list[Any]  # as termios has them

# What may have been left on: pasted text in brackets, a hidden cursor, colors.
_RESET = b"\x1b[?2004l\x1b[?25h\x1b[0m"


def is_interactive() -> bool:
    """Whether a person sits at both ends. Launcher and chat have the same stdin and stdout, so both
    come to the same answer."""
    return os.isatty(0) and os.isatty(1)


def knows_escapes() -> bool:
    """Whether the terminal understands escape sequences."""
    return os.environ.get("TERM", "dumb") != "dumb"


def read_modes() -> Modes | None:
    """The modes of the terminal; None where a chat has no person."""
    return termios.tcgetattr(0) if is_interactive() else None


def quieten(modes: Modes) -> None:
    """No echo between the words of an answer. What is typed meanwhile waits for the next prompt, as
    it was typed; the keys that send signals go on sending them."""
    apply([*modes[:3], modes[3] & ~(termios.ECHO | termios.ICANON), *modes[4:]])


def apply(modes: Modes) -> None:
    """Set the modes. From the background this stops us, as it does every program, until `fg`."""
    with suppress(termios.error):  # the terminal may have gone away
        termios.tcsetattr(0, termios.TCSANOW, modes)


def restore(modes: Modes | None) -> None:
    """Put the modes back, and show the cursor, if the terminal is ours."""
    if modes is None:
        return
    with suppress(OSError, termios.error):  # it may have gone away
        if os.tcgetpgrp(0) == os.getpgrp():
            termios.tcsetattr(0, termios.TCSANOW, modes)
            if knows_escapes():
                os.write(1, _RESET)


def can_be_continued() -> bool:
    """Whether there is a shell above that would continue us, once stopped. (The kernel does not let
    Ctrl-Z stop a process group without one.)"""
    pid = os.getpid()
    with suppress(OSError, IndexError, ValueError):
        while pid and os.getpgid(pid) == os.getpgrp():
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            pid = int(stat.rpartition(")")[2].split()[1])
        return pid > 0 and os.getsid(pid) == os.getsid(0)
    return False
