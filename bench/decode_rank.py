"""The part of bench/decode.py that runs in every rank: alternating decode steps and bare reads."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.rank_settings import RankSettings
from bench.breakdown import RECORDED_KERNELS, Recorded, record_tokens, work_and_wait
from comm import ops
from comm.group import Group, Rendezvous, open_group
from engine.background import compile_now
from engine.compiling import use_cache_folder
from engine.loop import generate
from engine.opening import all_cores
from engine.requests import Request
from engine.steps import EXTEND, GREEDY, Runner, make_runner, warm_up
from kernels.load import load_kernels
from models.config import ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import config_of, load_model
from models.presets import PRESETS
from weights.checkpoint import Checkpoint
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint


@torch.no_grad()
def main(env: RankSettings, payload: str) -> int:
    """Measure as the payload says; rank 0 writes the result as JSON into the payload's file."""
    task = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    use_cache_folder()
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    if not load_kernels():
        raise RuntimeError("the bound cannot be measured without a C++ compiler: install one")
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 1800.0) as group:
        model = load_model(*open_model(task["model"]), group, getattr(torch, task["dtype"]))
        with all_cores(env.plan.cpus) if env.bind_cores else nullcontext():
            runners = {batch: _runner(model, task, batch) for batch in task["batch"]}
            recorded = {}
            if task["profile"]:
                # Compiled separately, so that inductor's kernels are recorded too.
                with torch._inductor.config.patch(RECORDED_KERNELS):
                    recorded = {batch: _runner(model, task, batch, True) for batch in task["batch"]}
        read = weights_read(model)
        prompt = tuple(i % 100 for i in range(task["prompt"]))
        token_s: dict[int, list[float]] = {batch: [] for batch in runners}
        read_s = []
        for _ in range(task["samples"]):
            read_s.append(_read(read, group))
            for batch, runner in runners.items():
                token_s[batch].append(token_seconds(runner, prompt, batch, task["tokens"]))
        profiles = {batch: _profile(runner, prompt, batch, task) for batch, runner in recorded.items()}
        if group.rank == 0:
            found = {
                "weight_bytes": sum(weight.nbytes for weight in read),
                "read_s": read_s,
                "token_s": token_s,
                "profiles": profiles,
            }
            Path(task["out"]).write_text(json.dumps(found))
    return 0


def open_model(name: str) -> tuple[ModelConfig, Checkpoint]:
    if name in PRESETS:
        config = PRESETS[name]
        return config, random_checkpoint(expected_shapes(config), 0)
    checkpoint = open_checkpoint(Path(name))
    return config_of(checkpoint), checkpoint


def _runner(model: Decoder, task: dict[str, Any], batch: int, recorded: bool = False) -> Runner:
    """A runner with the same parameters, and its own KV cache. `recorded`: for the profiler, which sees
    inside steps that torch.compile has compiled."""
    own = twin(model)
    kv_dtype = getattr(torch, task["kv_dtype"]) if task["kv_dtype"] else None
    by_torch = recorded and not task["eager"]
    runner = make_runner(own, model.group, task["max_seq_len"], by_torch, batch, kv_dtype)
    if not (task["eager"] or recorded):
        compile_now(runner, own, (GREEDY, EXTEND))
    warm_up(runner, (EXTEND, GREEDY))
    return runner


def twin(model: Decoder) -> Decoder:
    """A copy of the model that shares its weights, but has no KV cache yet."""
    shared = [*model.parameters(), *model.buffers(), model.group]
    return copy.deepcopy(model, {id(each): each for each in shared})


def weights_read(model: Decoder) -> list[Tensor]:
    """The tensors that a decode step reads completely: all weights and scales, except the embedding if
    it is not tied to the head (a step reads one row of it)."""
    tied = model.head.weight is model.embed.weight  # if both are packed, they are buffers
    weights = [weight for weight in model.parameters() if weight is not model.embed.weight or tied]
    return weights + [each for name, each in model.named_buffers() if ".packed_" in name]


def _read(weights: Sequence[Tensor], group: Group) -> float:
    """Seconds to read all weights once, on the slowest rank."""
    ops.barrier(group)
    start = time.perf_counter()
    for weight in weights:
        torch.ops.yoke_kernels.read(weight)
    return slowest(time.perf_counter() - start, group)


def token_seconds(runner: Runner, prompt: tuple[int, ...], batch: int, tokens: int) -> float:
    """Seconds of a decode step: the mean of `tokens` steps after the first token."""
    # One more token than is timed: the first comes from the prompt.
    answers = generate(runner, [Request(prompt, tokens + 1)] * batch)
    return slowest(answers[0].tpot_s, runner.group)  # only rank 0 has times


def _profile(
    runner: Runner, prompt: tuple[int, ...], batch: int, task: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each rank, the parts of the fastest sample, in microseconds per token. Samples with and
    without the profiler alternate, to show the profiler's own cost."""
    requests = [Request(prompt, task["tokens"] + 1)] * batch
    plain, samples = [], []
    for _ in range(task["samples"]):
        plain.append(token_seconds(runner, prompt, batch, task["tokens"]))
        samples.append(record_tokens(runner, lambda steps: generate(steps, requests)))
    # The fastest sample of rank 0, on all ranks: collectives are compared call by call.
    best = min(range(len(samples)), key=lambda i: samples[i].token_us)
    best = int(ops.broadcast(torch.tensor([best]), 0, runner.group))
    return _parts_of_ranks(samples[best], 1e6 * min(plain), runner.group)


def _parts_of_ranks(sample: Recorded, plain_us: float, group: Group) -> list[dict[str, Any]]:
    calls = ops.all_gather(torch.tensor(sample.collective_us, dtype=torch.float64), group)
    names = list(sample.parts)
    own = torch.tensor([*sample.parts.values(), sample.token_us], dtype=torch.float64)
    found = []
    for rank, values in enumerate(ops.all_gather(own, group).tolist()):
        parts = dict(zip(names, values[:-1], strict=True))
        work, wait = work_and_wait(calls.tolist(), rank, sample.steps)
        parts |= {"collectives: work": work, "collectives: wait": wait}
        found.append({"rank": rank, "token_us": values[-1], "plain_us": plain_us, "parts": parts})
    return found


def slowest(seconds: float, group: Group) -> float:
    return float(ops.all_gather(torch.tensor([seconds]), group).max())
