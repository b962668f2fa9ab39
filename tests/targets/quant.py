"""Ranks that hold quantized weights: logits as one rank's."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, GroupOptions, Rendezvous, open_group
from models.load import config_of, load_model
from models.quant_rules import parse_quant
from weights.open import open_checkpoint

TOKENS = [[1, 17, 40, 63, 5, 111, 2, 90]]


@torch.no_grad()
def main(env: RankSettings, payload: str) -> int:
    """Compare the logits of groups of the payload's sizes with `wanted_file` beside each model."""
    job = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    for size in job["sizes"]:
        if env.rank < size:
            with open_group(
                env.rank, size, env.backend, rendezvous, 120.0, GroupOptions(str(size))
            ) as group:
                for path, quant in job["models"]:
                    logits = logits_of(Path(path), quant, group)
                    wanted = torch.load(wanted_file(Path(path), quant))
                    torch.testing.assert_close(
                        logits, wanted, rtol=1e-3, atol=1e-3, msg=f"{path} {quant}"
                    )
                    for other in ops.all_gather(logits, group):
                        assert torch.equal(other, logits), f"{path}: ranks hold different bits"
    with open_group(
        env.rank, env.world_size, env.backend, rendezvous, 300.0, GroupOptions("end")
    ) as group:
        ops.barrier(group)
    return 0


def wanted_file(path: Path, quant: str) -> Path:
    """Where the logits of a model lie that is loaded so."""
    return path.parent / f"wanted-{quant.replace('/', '-')}.pt"


@torch.no_grad()
def logits_of(path: Path, quant: str, group: Group) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    model = load_model(
        config_of(checkpoint), checkpoint, group, torch.float32, quant=parse_quant(quant)
    )
    assert model.quantized
    model.setup(1, 32)
    tokens = torch.tensor(TOKENS)
    return model.all_logits(tokens, torch.arange(tokens.shape[1]))
