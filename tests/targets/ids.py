"""The greedy tokens of models, on groups of several sizes, against those in the payload."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import GroupOptions, Rendezvous, open_group
from models.load import config_of, load_model
from models.quant_rules import parse_quant
from models.reference import generate
from weights.open import open_checkpoint


def main(env: RankSettings, payload: str) -> int:
    """Each of the payload's `models` (path, quant, prompt, wanted) on the first ranks of `sizes`."""
    job = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    for size in job["sizes"]:
        if env.rank < size:
            with open_group(
                env.rank, size, env.backend, rendezvous, 120.0, GroupOptions(str(size))
            ) as group:
                for path, quant, prompt, wanted in job["models"]:
                    checkpoint = open_checkpoint(Path(path))
                    model = load_model(
                        config_of(checkpoint),
                        checkpoint,
                        group,
                        torch.float32,
                        quant=parse_quant(quant),
                    )
                    found = generate(model, group, prompt, len(wanted))
                    assert found == wanted, f"{path}: {found} instead of {wanted}"
                    assert bool(model.quantized) == (quant != "none"), path
    with open_group(
        env.rank, env.world_size, env.backend, rendezvous, 300.0, GroupOptions("end")
    ) as group:
        ops.barrier(group)
    return 0
