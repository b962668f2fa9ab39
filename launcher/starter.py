"""Whether the manager whose variables are set really started this process: what the process tree tells.

Variables of torchrun, srun and mpirun stay in the environment of everything that a rank starts, of a
shell too, and whoever reads them there waits for ranks that nobody starts. The tree cannot prove that
all ranks were started (containers hide it), so it never decides alone: it decides who speaks, and
refuses what was typed into a rank's own shell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# By manager, what one of the processes above a rank is called.
_STARTERS = {
    "torchrun": r"torchrun|torch[./]distributed|elastic",
    "mpirun": r"\b(mpirun|mpiexec|orterun|orted|prterun|prted)\b",
    "mpiexec": r"\b(mpirun|mpiexec|hydra\w*)\b",
    "srun": r"slurmstepd",
}
_SHELLS = {"bash", "zsh", "sh", "dash", "ksh", "fish", "tcsh", "csh", "ash"}
_MAX_DEPTH = 64


def was_started_by(manager: str, pid: int, root: Path = Path("/proc")) -> bool:
    """Whether a process of the manager's is among the ancestors of process `pid`."""
    pattern = _STARTERS.get(manager)
    for _ in range(_MAX_DEPTH):
        pid = _look(pid, root).parent
        if pattern is None or pid <= 0:
            return False
        if re.search(pattern, " ".join(_words(pid, root)[:6])):
            return True
    return False


def is_typed_in_rank(variables: Mapping[str, str], pid: int, root: Path = Path("/proc")) -> bool:
    """Whether process `pid` was started at the prompt of a shell that has been started with these
    variables: then the shell is the rank that they describe."""
    own = _look(pid, root)
    shell = _look(own.parent, root)
    # A shell at a terminal gives each job a process group of its own; one that runs a script does not.
    is_job = own.group == pid != shell.group and own.terminal != 0
    if shell.name not in _SHELLS or not is_job or not variables:
        return False
    try:
        initial = set((root / str(own.parent) / "environ").read_bytes().split(b"\0"))
    except OSError:
        return False
    return all(f"{key}={value}".encode() in initial for key, value in variables.items())


@dataclass(frozen=True)
class _Process:
    """From a stat file; of a process that cannot be seen all is 0."""

    name: str = ""
    parent: int = 0
    group: int = 0
    terminal: int = 0


def _look(pid: int, root: Path) -> _Process:
    try:
        text = (root / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return _Process()
    before, _, after = text.rpartition(")")  # the name may itself hold parentheses
    _state, parent, group, _session, terminal, *_ = after.split()
    return _Process(before.partition("(")[2], int(parent), int(group), int(terminal))


def _words(pid: int, root: Path) -> list[str]:
    """The command line; a process that hides it goes by its name (slurmstepd rewrites its own)."""
    try:
        text = (root / str(pid) / "cmdline").read_text(errors="replace")
    except OSError:
        text = ""
    return [word for word in text.split("\0") if word] or [_look(pid, root).name]
