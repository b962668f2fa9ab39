"""The folders of the user who runs this process: home, caches, state.

One place, since a process may have none of them: a container runs under a uid without an entry in the
password file and without HOME. Then the answer is None, and the caller goes on as with a folder that
cannot be written. Not here: making a folder, or judging who else may write to it.
"""

from __future__ import annotations

import os
import pwd
from contextlib import suppress
from pathlib import Path


def home() -> Path | None:
    """`$HOME`, else what the password file says. A path that is not absolute counts as none: it would
    be a folder of wherever the process was started."""
    named = os.environ.get("HOME", "")
    if not os.path.isabs(named):
        with suppress(KeyError):
            named = pwd.getpwuid(os.getuid()).pw_dir
    return Path(named) if os.path.isabs(named) else None


def cache_home() -> Path | None:
    """`$XDG_CACHE_HOME`, else `~/.cache`; None without a home. What is in it may vanish at any time."""
    return _base("XDG_CACHE_HOME", ".cache")


def state_home() -> Path | None:
    """`$XDG_STATE_HOME`, else `~/.local/state`; None without a home."""
    return _base("XDG_STATE_HOME", ".local/state")


def runtime_home() -> Path | None:
    """`$XDG_RUNTIME_DIR`, which the system makes for this user alone; None where it did not."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(named) if os.path.isabs(named) else None


def expand(path: str | Path) -> Path:
    """`~` and `~name` as the user's home folder. Where there is no such user the path stays as it is,
    so that what opens it says that there is no such file."""
    text = os.fspath(path)
    if text == "~" or text.startswith("~/"):
        own = home()
        return Path(text) if own is None else own / text[2:]
    return Path(os.path.expanduser(text))


def _base(variable: str, default: str) -> Path | None:
    """A folder of the XDG base directory specification, which has a relative value ignored."""
    named = os.environ.get(variable, "")
    if os.path.isabs(named):
        return Path(named)
    own = home()
    return None if own is None else own / default
