"""Another user of the machine, for tests that run as root; they are skipped elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

NOBODY = 65534
UNKNOWN = 4711  # no user

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="acts as another user, for which it must run as root and find setpriv",
)


def by_nobody(*command: str) -> list[str]:
    """The command line that runs `command` as the user nobody."""
    ids = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    return ["setpriv", *ids, *command]


def by_unknown(*command: str) -> list[str]:
    """As a uid that the password file does not know, in an environment without HOME. It may read what
    root may, so that it finds this Python wherever that lies."""
    ids = (f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups")
    caps = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    environ = ("env", "-i", f"PATH={os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE=1")
    return ["setpriv", *ids, *caps, *environ, *command]


def nobody_runs(code: str) -> None:
    """Run lines of Python as that user, with the standard library alone."""
    python = os.path.realpath(sys.executable)
    subprocess.run(by_nobody(python, "-I", "-S", "-c", code), check=True, cwd="/", timeout=60)
