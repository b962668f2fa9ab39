"""Several machines: this process becomes torch's elastic agent, which does the rendezvous.

`launch.py --nnodes 2 --node-rank 0 --rdzv-endpoint HOST:PORT ...` on each machine is the same as
`torchrun` with the number of ranks that the plan has on that machine. The agent starts `launch.py`
again as each rank, which reads its place from the agent's variables (`launcher.manager`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from base.errors import LaunchError

FLAGS = ("--nnodes", "--node-rank", "--rdzv-endpoint")


def check_nodes(nnodes: int, node_rank: int | None, endpoint: str | None) -> None:
    """Raise LaunchError unless the three flags are complete and consistent."""
    if nnodes < 1:
        raise LaunchError(f"--nnodes {nnodes}: must be at least 1")
    if nnodes == 1 and node_rank is None and endpoint is None:
        return
    if node_rank is None or not 0 <= node_rank < nnodes:
        raise LaunchError(f"--nnodes {nnodes} needs --node-rank 0 to {nnodes - 1}, not {node_rank}")
    if endpoint is None or not re.fullmatch(r".+:\d{1,5}", endpoint):
        raise LaunchError(
            f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT, the same on all machines, where HOST "
            f"is the machine with --node-rank 0; not {endpoint}"
        )


def agent_command(
    script: Path,
    head: Sequence[str],
    program: Sequence[str],
    nnodes: int,
    node_rank: int,
    endpoint: str,
    num_ranks: int,
) -> list[str]:
    """The elastic agent's command line. `head` and `program` are the words of this command; the flags
    that the agent handles are removed from `head`."""
    return [
        sys.executable,
        *("-P", "-m", "torch.distributed.run"),  # -P: ignore a torch.py in the current folder
        *("--nnodes", str(nnodes), "--node-rank", str(node_rank)),
        *("--nproc-per-node", str(num_ranks), "--max-restarts", "0"),
        *("--rdzv-backend", "static", "--rdzv-endpoint", endpoint, "--rdzv-id", "yoke"),
        str(script),
        *_without_flags(head),
        *program,
    ]


def _without_flags(argv: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if skip:
            skip = False
        elif name in FLAGS:
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def become_agent(command: Sequence[str]) -> None:
    """Replace this process with the agent."""
    os.execv(command[0], list(command))
