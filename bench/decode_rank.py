"""The part of bench/decode.py that runs in every rank: tokens and bare reads of the weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from comm import ops
from comm.group import Rendezvous, open_group
from engine.loop import generate, make_runner, warm_up
from engine.rank import all_cores
from kernels.load import load_kernels
from models.config import expected_shapes
from models.load import load_model
from models.presets import PRESETS
from models.sampling import Sampling
from weights.random_io import random_checkpoint


@torch.no_grad()
def main(env: Any, payload: str) -> int:
    """Measure what the payload asks for; rank 0 writes it as JSON into the payload's file."""
    task = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    config = PRESETS[task["model"]]
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 1800.0) as group:
        weights = random_checkpoint(expected_shapes(config), 0)
        model = load_model(config, weights, group, torch.bfloat16)
        runner = make_runner(model, group, task["max_seq_len"], not task["eager"])
        with all_cores(env.plan.cpus):
            warm_up(runner)
        if not load_kernels():
            raise RuntimeError("the bound cannot be measured without a C++ compiler")
        # A token reads all weights but the embedding, of which it reads a row.
        read = [p for p in model.parameters() if p is not model.embed.weight or config.tie_embeddings]
        size = sum(p.nbytes for p in read)
        prompt = [i % 100 for i in range(task["prompt"])]
        token_s, read_s = [], []
        for _ in range(task["samples"]):
            ops.barrier(group)
            start = time.perf_counter()
            for weight in read:
                torch.ops.yoke_kernels.read(weight)
            read_s.append(_slowest(time.perf_counter() - start, group))
            made = generate(runner, prompt, task["tokens"] + 1, frozenset(), Sampling(), 0)
            token_s.append(_slowest(made.tpot_s, group))
        if group.rank == 0:
            found = {"token_s": token_s, "read_s": read_s, "weight_bytes": size}
            Path(task["out"]).write_text(json.dumps(found))
    return 0


def _slowest(seconds: float, group: Any) -> float:
    return float(ops.all_gather(torch.tensor([seconds]), group).max())
