"""A rank's part of models that transformers runs: its logits, and what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Rendezvous, open_group
from tests.models.hf_families import load_hf

LENGTHS = (9, 5, 7)  # of the prompts in a batch; each is padded to 12
STEPS = 8


def run(model: Any, tokens: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Logits [rows, 1 + STEPS, vocabulary]: after each row's prompt and each token that follows."""
    lengths = torch.tensor([LENGTHS[row] for row in rows])
    tokens, each = tokens[rows], torch.arange(len(rows))
    model.setup(len(rows), 32)
    model.forward(tokens[:, :3], torch.arange(3).expand(len(rows), 3), None)  # leftovers
    padded = tokens[:, :12].clone()
    padded[torch.arange(12) >= lengths.unsqueeze(1)] = 0
    wanted = torch.arange(len(rows)) * 12 + lengths - 1
    made = [model(padded, torch.arange(12).expand(len(rows), 12), wanted)]
    for step in range(STEPS):
        positions = lengths + step
        made.append(model(tokens[each, positions].unsqueeze(1), positions.unsqueeze(1)))
    return torch.stack(made, dim=1)


def wanted_of(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The same rows of the whole model's logits [3, length, vocabulary]."""
    return torch.stack([logits[row, LENGTHS[row] - 1 : LENGTHS[row] + STEPS] for row in rows])


@torch.no_grad()
def main(env: RankSettings, payload: str) -> int:
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    tokens = torch.randint(0, 301, (3, 20), generator=torch.Generator().manual_seed(1))
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 120.0) as group:
        for name, folder in json.loads(payload)["folders"].items():
            path = Path(folder)
            model = load_hf(path, group)
            wanted = torch.load(path / "wanted.pt")
            for rows in ([0, 1, 2], [1]):
                logits = run(model, tokens, rows)
                is_close = torch.isclose(logits, wanted_of(wanted, rows), rtol=1e-4, atol=1e-4)
                assert is_close.all(), f"{name}: {(logits - wanted_of(wanted, rows)).abs().max()} apart"
                for other in ops.all_gather(logits, group):
                    assert torch.equal(other, logits), f"{name}: ranks hold different bits"
            held = torch.tensor([sum(p.nbytes for p in model.parameters())])
            caches = torch.tensor([sum(t.nbytes for cache in model.caches for t in cache.buffers())])
            shares = ops.all_gather(torch.cat((held, caches)), group)
            if group.rank == 0:
                print(json.dumps({"name": name, "held": shares.tolist()}), flush=True)
    return 0
