"""The part of bench/prefill.py that runs in every rank: prompts, and the cores' peak."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comm import ops
from comm.group import Group, Rendezvous, open_group
from engine.opening import all_cores
from kernels.load import load_kernels
from models.config import ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import load_model
from models.presets import PRESETS
from weights.random_io import random_checkpoint

PEAK_SECONDS = 0.1  # of one sample


@torch.no_grad()
def main(env: Any, payload: str) -> int:
    """Measure what the payload asks for; rank 0 writes it as JSON into the payload's file."""
    task = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    config = PRESETS[task["model"]]
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 1800.0) as group:
        if not load_kernels():
            raise RuntimeError("the bound cannot be measured without a C++ compiler")
        weights = random_checkpoint(expected_shapes(config), 0)
        model = load_model(config, weights, group, torch.bfloat16)
        run = prompt_run(model, task["prompt"], not task["eager"])
        with all_cores(env.plan.cpus):
            run()
        run()
        rounds = _rounds()
        work = _sum(operations(model, config, task["prompt"]), group)
        prompt_s, peaks = [], []
        for _ in range(task["samples"]):
            ops.barrier(group)
            start = time.perf_counter()
            done = torch.ops.yoke_kernels.peak(rounds)
            peaks.append(_sum(done / (time.perf_counter() - start), group))
            ops.barrier(group)
            start = time.perf_counter()
            run()
            seconds = torch.tensor([time.perf_counter() - start])
            prompt_s.append(float(ops.all_gather(seconds, group).max()))
        if group.rank == 0:
            found = {"prompt_s": prompt_s, "peak_per_s": peaks, "operations": work}
            Path(task["out"]).write_text(json.dumps(found))
    return 0


def prompt_run(model: Decoder, prompt: int, compiled: bool) -> Callable[[], Tensor]:
    """A call that runs a prompt of so many tokens through the model, to the last one's logits."""
    model.setup(1, prompt)
    tokens = torch.arange(prompt).remainder(100).unsqueeze(0)
    positions, last = torch.arange(prompt).unsqueeze(0), torch.tensor([prompt - 1])

    def prefill(tokens: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        logits: Tensor = model(tokens, positions, last)
        return logits

    step = torch.compile(prefill, fullgraph=True, dynamic=False) if compiled else prefill
    return lambda: step(tokens, positions, last)


def operations(model: Decoder, config: ModelConfig, prompt: int) -> float:
    """Of this rank, for a prompt: products with weights, the head's for one token, and attention's
    with the tokens that each token sees (windows are not looked at)."""
    head = model.head.weight.numel()
    products = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    seen = prompt * (prompt + 1) // 2
    heads = model.layout.heads.q_stop - model.layout.heads.q_start
    attention = 4 * config.num_layers * heads * config.head_dim * seen
    return 2.0 * (products * prompt + head) + attention


def _rounds() -> int:
    torch.ops.yoke_kernels.peak(100_000)
    start = time.perf_counter()
    torch.ops.yoke_kernels.peak(100_000)
    return int(100_000 * PEAK_SECONDS / (time.perf_counter() - start)) + 1


def _sum(value: float, group: Group) -> float:
    return float(ops.all_gather(torch.tensor([value], dtype=torch.float64), group).sum())
