"""The terminal of a chat: read and set its modes, and restore them whatever happened.

Two processes can restore them: the chat's process if the launcher was killed, the launcher if the chat
was. Neither changes a terminal that another process group has at the moment: a shell whose job has died
restores its own modes.
"""

from __future__ import annotations

import os
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

Modes = list[Any]  # the list of termios.tcgetattr

# Turn off what may have been left on: bracketed paste, a hidden cursor, colors.
_RESET = b"\x1b[?2004l\x1b[?25h\x1b[0m"


def is_interactive() -> bool:
    """Whether both stdin and stdout are terminals. Launcher and chat have the same stdin and stdout, so
    both get the same answer."""
    return os.isatty(0) and os.isatty(1)


def knows_escapes() -> bool:
    """Whether the terminal understands escape sequences."""
    return os.environ.get("TERM", "dumb") != "dumb"


def read_modes() -> Modes | None:
    """The modes of the terminal; None if the chat is not interactive."""
    return termios.tcgetattr(0) if is_interactive() else None


def turn_echo_off(modes: Modes) -> None:
    """Turn off echo while an answer is printed. What is typed meanwhile is kept unchanged for the next
    prompt; keys that send signals still send them."""
    apply([*modes[:3], modes[3] & ~(termios.ECHO | termios.ICANON), *modes[4:]])


def apply(modes: Modes) -> None:
    """Set the modes. In the background, the kernel stops this process here until `fg`."""
    with suppress(termios.error):  # the terminal may be closed
        termios.tcsetattr(0, termios.TCSANOW, modes)


def restore(modes: Modes | None) -> None:
    """Restore the modes, and show the cursor, if our process group has the terminal."""
    if modes is None:
        return
    with suppress(OSError, termios.error):  # the terminal may be closed
        if os.tcgetpgrp(0) == os.getpgrp():
            termios.tcsetattr(0, termios.TCSANOW, modes)
            if knows_escapes():
                os.write(1, _RESET)


def can_be_continued() -> bool:
    """Whether a shell above this process could continue it after a stop. (The kernel does not let
    Ctrl-Z stop a process group without one.)"""
    pid = os.getpid()
    with suppress(OSError, IndexError, ValueError):
        while pid and os.getpgid(pid) == os.getpgrp():
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            pid = int(stat.rpartition(")")[2].split()[1])
        return pid > 0 and os.getsid(pid) == os.getsid(0)
    return False
