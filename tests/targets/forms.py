"""Ranks that hold weights of several forms: logits as those of one rank that dequantizes all."""

from __future__ import annotations

import json

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, GroupOptions, Rendezvous, open_group
from models.config import ModelConfig, from_dict
from models.decoder import Decoder
from models.load import load_model
from models.quant_rules import parse_quant
from tests.models.forms import checkpoint_of

TOKENS = [[1, 17, 40, 130, 5, 111, 2, 90, 43, 44, 87, 88]]


@torch.no_grad()
def main(env: RankSettings, payload: str) -> int:
    """For each size of the payload, compare its models with what one rank computes in float32."""
    job = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    wanted = [logits_of(Group(0, 1), "none", from_dict(c), *forms)[0] for c, *forms in job["models"]]
    for size in job["sizes"]:
        if env.rank < size:
            with open_group(
                env.rank, size, env.backend, rendezvous, 120.0, GroupOptions(str(size))
            ) as group:
                for right, (config, *forms) in zip(wanted, job["models"], strict=True):
                    logits, _ = logits_of(group, "auto", from_dict(config), *forms)
                    close(logits, right)
                    for other in ops.all_gather(logits, group):
                        assert torch.equal(other, logits), "ranks hold different bits"
    with open_group(
        env.rank, env.world_size, env.backend, rendezvous, 300.0, GroupOptions("end")
    ) as group:
        ops.barrier(group)
    return 0


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the order of float32 sums."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
def logits_of(
    group: Group, quant: str, config: ModelConfig, forms: dict[str, str], embedding: str, head: str
) -> tuple[torch.Tensor, Decoder]:
    checkpoint = checkpoint_of(config, forms, embedding, head)
    model = load_model(config, checkpoint, group, torch.float32, quant=parse_quant(quant))
    model.setup(1, 32)
    tokens = torch.tensor(TOKENS)
    return model.all_logits(tokens, torch.arange(tokens.shape[1])), model
