"""The part of bench/decode.py that runs in every rank: tokens and bare reads of the weights."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.profile import where_time_goes
from comm import ops
from comm.group import Rendezvous, open_group
from engine.compiling import use_cache_folder
from engine.loop import generate
from engine.opening import all_cores
from engine.requests import Request
from engine.steps import EXTEND, GREEDY, make_runner, warm_up
from kernels.load import load_kernels
from models.config import expected_shapes
from models.load import config_of, load_model
from models.presets import PRESETS
from weights.checkpoint import open_checkpoint
from weights.random_io import random_checkpoint


@torch.no_grad()
def main(env: Any, payload: str) -> int:
    """Measure what the payload asks for; rank 0 writes it as JSON into the payload's file."""
    task = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    use_cache_folder()
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    if task["model"] in PRESETS:
        config = PRESETS[task["model"]]
        weights = random_checkpoint(expected_shapes(config), 0)
    else:
        weights = open_checkpoint(Path(task["model"]))
        config = config_of(weights)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 1800.0) as group:
        model = load_model(config, weights, group, getattr(torch, task["dtype"]))
        runners = {}
        with all_cores(env.plan.cpus) if env.bind_cores else nullcontext():
            for batch in task["batch"]:
                runners[batch] = make_runner(
                    model, group, task["max_seq_len"], not task["eager"], batch,
                    getattr(torch, task["kv_dtype"]),
                )  # fmt: skip
                warm_up(runners[batch], (EXTEND, GREEDY))
        if not load_kernels():
            raise RuntimeError("the bound cannot be measured without a C++ compiler")
        # A token reads all weights but the embedding, of which it reads a row.
        read = [p for p in model.parameters() if p is not model.embed.weight or config.tie_embeddings]
        size = sum(p.nbytes for p in read)
        prompt = tuple(i % 100 for i in range(task["prompt"]))
        token_s: dict[int, list[float]] = {batch: [] for batch in runners}
        read_s = []
        for _ in range(task["samples"]):
            ops.barrier(group)
            start = time.perf_counter()
            for weight in read:
                torch.ops.yoke_kernels.read(weight)
            read_s.append(_slowest(time.perf_counter() - start, group))
            for batch, runner in runners.items():
                runner.reset()
                made = generate(runner, [Request(prompt, task["tokens"] + 1)] * batch)
                token_s[batch].append(_slowest(made[0].tpot_s, group))
        profile = None
        if task["profile"]:
            profile = where_time_goes(runners[task["batch"][0]], prompt, task["tokens"])
        if group.rank == 0:
            found = {"token_s": token_s, "read_s": read_s, "weight_bytes": size, "profile": profile}
            Path(task["out"]).write_text(json.dumps(found))
    return 0


def _slowest(seconds: float, group: Any) -> float:
    return float(ops.all_gather(torch.tensor([seconds]), group).max())
