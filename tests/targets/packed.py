"""Ranks that hold bfloat16 weights packed, or as they are: logits as those of one rank in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, Rendezvous, open_group
from kernels.load import load_kernels
from models.config import ModelConfig, expected_shapes
from models.load import load_model
from weights.formats.random_io import random_checkpoint

TOKENS = 40  # more than a few rows


@torch.no_grad()
def main(env: RankSettings, payload: str) -> int:
    """Compare with the tensors in the payload's file: (configuration, wanted, tolerance)."""
    torch.set_num_threads(env.plan.num_threads)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    cases = torch.load(Path(json.loads(payload)["file"]), weights_only=False)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 120.0) as group:
        for config, wanted, tolerance in cases:
            logits = logits_of(config, group, torch.bfloat16, packed=True)
            torch.testing.assert_close(logits, wanted, rtol=0, atol=tolerance)
            for other in ops.all_gather(logits, group):
                assert torch.equal(other, logits), "ranks hold different bits"
    return 0


@torch.no_grad()
def logits_of(config: ModelConfig, group: Group, dtype: torch.dtype, packed: bool) -> torch.Tensor:
    """Of a random model, whatever this processor prefers: float32 [1, TOKENS, vocab_size]."""
    assert load_kernels()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tp.layers.prefers_packed", lambda: packed)
        model = load_model(config, random_checkpoint(expected_shapes(config), 3), group, dtype)
    held = model.head.packing is not None
    assert held == (packed and dtype == torch.bfloat16)
    if held:
        assert all(p.ndim == 1 or p is model.embed.weight for p in model.parameters())
        assert (model.embed.weight is None) == config.tie_embeddings
    model.setup(1, 64)
    tokens = torch.arange(TOKENS).unsqueeze(0) * 3
    return model.all_logits(tokens, torch.arange(TOKENS))
