"""A rank's part of each family's model: logits against transformers, and the same bits everywhere.

With `figures` in the payload rank 0 leaves the differences in that file (for `tests/models/table.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, GroupOptions, Rendezvous, open_group
from models.load import config_of, load_model
from tests.models.families import STEPS, largest_difference, run
from weights.open import open_checkpoint


@torch.no_grad()
def main(env: RankSettings, payload: str) -> int:
    """Run the families in groups of the payload's sizes, one after the other, of the first ranks."""
    job = json.loads(payload)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    for size in job["sizes"]:
        if env.rank < size:
            with open_group(
                env.rank, size, env.backend, rendezvous, 120.0, GroupOptions(str(size))
            ) as group:
                _run(job, group)
    with open_group(
        env.rank, env.world_size, env.backend, rendezvous, 300.0, GroupOptions("end")
    ) as group:
        ops.barrier(group)
    return 0


def _run(job: dict[str, Any], group: Group) -> None:
    figures: dict[str, list[float]] = {}
    for name, folder in job["folders"].items():
        checkpoint = open_checkpoint(Path(folder))
        model = load_model(config_of(checkpoint, group), checkpoint, group, torch.float32)
        wanted = torch.load(Path(folder) / "wanted.pt")
        steps = STEPS if group.size == 2 else 11  # many ranks share few cores
        logits = run(model, steps=steps)
        wanted = wanted[:, : steps + 1]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4, msg=name)
        if group.size == 2:
            one = run(model, slice(1, 2))
            torch.testing.assert_close(one, wanted[1:2], rtol=1e-4, atol=1e-4, msg=name)
            figures[name] = [largest_difference(logits, wanted), largest_difference(one, wanted[1:2])]
        for other in ops.all_gather(logits, group):
            assert torch.equal(other, logits), f"{name}: ranks hold different bits"
        if group.rank == 0:
            print(group.size, name, flush=True)
    if group.rank == 0 and "figures" in job:
        Path(job["figures"]).write_text(json.dumps(figures))
