"""Continue in the checkout's own `.venv` where the Python that was called lacks a package.

`python launch.py` is mostly called with the system's Python, while `make setup` puts the packages into
`.venv`. So the process replaces itself, once, by the same command under `.venv/bin/python`. A program
of the user's (`run`) keeps the Python that it was called with: its packages are there, and the launcher
needs none. Pythons that are too old for Yoke read this file too.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

# What requirements/runtime.txt installs, by the names that are imported; and torch.
PACKAGES = (
    "gguf", "huggingface_hub", "jinja2", "numpy", "omegaconf", "psutil", "rich", "safetensors",
    "tokenizers", "torch",
)  # fmt: skip
_OLDEST = (3, 11)
_REASON = "YOKE_CONTINUED"  # the environment variable that carries the reason to the second process


def continue_in_venv(checkout: str) -> None:
    """Replace this process by the same command in `.venv`, if something is missing here and there is a
    `.venv`. Else return: what is missing is an error where it is needed. A Python that is too old and
    cannot be replaced is an error here."""
    venv = os.path.join(checkout, ".venv")
    python = os.path.join(venv, "bin", "python")
    too_old = sys.version_info < _OLDEST
    usable = os.access(python, os.X_OK) and not _same(venv, sys.prefix) and _REASON not in os.environ
    if usable and "run" not in sys.argv[1:] and (missing := _missing()):
        os.environ[_REASON] = f"{sys.executable} lacks {missing}: continuing with {python}"
        # Before Python 3.10 there is no orig_argv; argv has all but the interpreter's own flags.
        words = getattr(sys, "orig_argv", ["", *sys.argv])[1:]
        os.execv(python, [python, *words])
    if too_old:
        sys.stderr.write(
            f"error: {sys.executable} is Python {sys.version.split()[0]}, and Yoke needs "
            f"{'.'.join(map(str, _OLDEST))} or newer: use another, or .venv/bin/python (make setup)\n"
        )
        sys.exit(2)


def why_continued() -> str:
    """Why this process continues another one; "" if it does not. What it starts does not continue it,
    so a second call returns ""."""
    return os.environ.pop(_REASON, "")


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _missing() -> str:
    if sys.version_info < _OLDEST:
        return "Python " + ".".join(map(str, _OLDEST))
    return ", ".join(name for name in PACKAGES if find_spec(name) is None)
