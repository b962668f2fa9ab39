"""Load this rank's part of a checkpoint, and print how much memory it took."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from base.rank_settings import RankSettings
from comm.group import Group
from engine.generate import peak_rss_bytes
from models.load import config_of, load_model
from weights.open import open_checkpoint


def main(env: RankSettings, payload: str) -> int:
    torch.set_num_threads(env.plan.num_threads)
    checkpoint = open_checkpoint(Path(json.loads(payload)["folder"]))
    group = Group(env.rank, env.world_size)  # a layout: loading needs no transport
    model = load_model(config_of(checkpoint), checkpoint, group, torch.bfloat16)
    shard = sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
    peak = peak_rss_bytes()
    print(json.dumps({"rank": env.rank, "shard": shard, "peak": peak}), flush=True)
    return 0
