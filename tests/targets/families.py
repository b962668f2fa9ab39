"""A rank's part of each family's model: logits against transformers, and the same bits everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from comm import ops
from comm.group import Rendezvous, open_group
from models.load import config_of, load_model
from tests.models.families import STEPS, run
from weights.checkpoint import open_checkpoint


@torch.no_grad()
def main(env: Any, payload: str) -> int:
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 120.0) as group:
        for name, folder in json.loads(payload)["folders"].items():
            checkpoint = open_checkpoint(Path(folder))
            model = load_model(config_of(checkpoint), checkpoint, group, torch.float32)
            wanted = torch.load(Path(folder) / "wanted.pt")
            steps = STEPS if group.size == 2 else 5  # many ranks share few cores
            logits = run(model, steps=steps)
            torch.testing.assert_close(logits, wanted[:, : steps + 1], rtol=1e-4, atol=1e-4, msg=name)
            if group.size == 2:
                one = run(model, slice(1, 2))
                torch.testing.assert_close(one, wanted[1:2], rtol=1e-4, atol=1e-4, msg=name)
            for other in ops.all_gather(logits, group):
                assert torch.equal(other, logits), f"{name}: ranks hold different bits"
            if group.rank == 0:
                print(name, flush=True)
    return 0
