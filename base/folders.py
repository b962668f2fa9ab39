"""The folders of the user who runs this process: home, caches, state.

They are looked up only here, since a process may have none of them: a container may run under a uid
without an entry in the password file and without HOME. Then the result is None, and the caller treats
it like a folder that cannot be written. Not here: making a folder, or checking who may write to it.
"""

from __future__ import annotations

import os
import pwd
from contextlib import suppress
from pathlib import Path


def home() -> Path | None:
    """`$HOME`, else the home in the password file. A relative path is ignored: it would depend on the
    folder in which the process was started."""
    named = os.environ.get("HOME", "")
    if not os.path.isabs(named):
        with suppress(KeyError):
            named = pwd.getpwuid(os.getuid()).pw_dir
    return Path(named) if os.path.isabs(named) else None


def cache_home() -> Path | None:
    """`$XDG_CACHE_HOME`, else `~/.cache`; None without a home. Its files may be deleted at any time."""
    return _base("XDG_CACHE_HOME", ".cache")


def state_home() -> Path | None:
    """`$XDG_STATE_HOME`, else `~/.local/state`; None without a home."""
    return _base("XDG_STATE_HOME", ".local/state")


def runtime_home() -> Path | None:
    """`$XDG_RUNTIME_DIR`, which the system makes for this user alone; None if it is not set."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(named) if os.path.isabs(named) else None


def expand(path: str | Path) -> Path:
    """The path with a leading `~` or `~name` replaced by the home folder. If there is no such user, the
    path is unchanged, so that opening it fails with "no such file"."""
    text = os.fspath(path)
    if text == "~" or text.startswith("~/"):
        own = home()
        return Path(text) if own is None else own / text[2:]
    return Path(os.path.expanduser(text))


def _base(variable: str, default: str) -> Path | None:
    """A folder of the XDG base directory specification, by which a relative value is ignored."""
    named = os.environ.get(variable, "")
    if os.path.isabs(named):
        return Path(named)
    own = home()
    return None if own is None else own / default
