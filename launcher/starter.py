"""Check in the process tree whether the manager whose variables are set really started this process.

Everything that a rank starts, a shell too, inherits the variables of torchrun, srun or mpirun. A
command that trusts them there would wait for ranks that nobody starts. The tree cannot prove that all
ranks were started (containers hide it), so it does not decide alone. It decides which rank prints an
error, and it rejects a command that was typed into the shell of a rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# For each manager, a pattern for the command line of its process above a rank.
_STARTERS = {
    "torchrun": r"torchrun|torch[./]distributed|elastic",
    "mpirun": r"\b(mpirun|mpiexec|orterun|orted|prterun|prted)\b",
    "mpiexec": r"\b(mpirun|mpiexec|hydra\w*)\b",
    "srun": r"slurmstepd",
}
_SHELLS = {"bash", "zsh", "sh", "dash", "ksh", "fish", "tcsh", "csh", "ash"}
_MAX_DEPTH = 64


def was_started_by(manager: str, pid: int, root: Path = Path("/proc")) -> bool:
    """Whether a process of the manager is among the ancestors of process `pid`."""
    pattern = _STARTERS.get(manager)
    for _ in range(_MAX_DEPTH):
        pid = _read_process(pid, root).parent
        if pattern is None or pid <= 0:
            return False
        if re.search(pattern, " ".join(_command_line(pid, root)[:6])):
            return True
    return False


def is_typed_in_rank(variables: Mapping[str, str], pid: int, root: Path = Path("/proc")) -> bool:
    """Whether process `pid` was typed at the prompt of a shell that was itself started with these
    variables. Then the shell is the rank that they describe."""
    own = _read_process(pid, root)
    shell = _read_process(own.parent, root)
    # An interactive shell gives each job its own process group; a shell that runs a script does not.
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
    """Fields of a stat file; all 0 or empty for a process that is not visible."""

    name: str = ""
    parent: int = 0
    group: int = 0
    terminal: int = 0


def _read_process(pid: int, root: Path) -> _Process:
    try:
        text = (root / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return _Process()
    before, _, after = text.rpartition(")")  # the name may contain parentheses
    _state, parent, group, _session, terminal, *_ = after.split()
    return _Process(before.partition("(")[2], int(parent), int(group), int(terminal))


def _command_line(pid: int, root: Path) -> list[str]:
    """The command line, or the process's name if that is hidden (slurmstepd rewrites its own)."""
    try:
        text = (root / str(pid) / "cmdline").read_text(errors="replace")
    except OSError:
        text = ""
    return [word for word in text.split("\0") if word] or [_read_process(pid, root).name]
