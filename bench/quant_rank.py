"""The part of bench/quant.py that runs in every rank: variants of the same model, alternating."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from base.rank_settings import RankSettings
from bench.decode_rank import open_model, slowest, token_seconds, weights_read
from bench.quant import EAGER, PLAIN
from comm import ops
from comm.group import Group, Rendezvous, open_group
from engine.background import compile_now
from engine.compiling import use_cache_folder
from engine.opening import all_cores
from engine.steps import EXTEND, GREEDY, Runner, extend, make_runner, warm_up
from kernels.load import load_kernels
from models.load import load_model
from models.quant_rules import parse_quant

SHORT = 32  # tokens in the cache before the first step that is timed


@torch.no_grad()
def main(env: RankSettings, payload: str) -> int:
    """Measure as the payload says; rank 0 writes the result as JSON into the payload's file."""
    task = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    use_cache_folder()
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    if not load_kernels():
        raise RuntimeError("quantized weights need Yoke's kernels: install a C++ compiler")
    names, length = task["variants"], max(task["prompt"], SHORT) + task["tokens"] + 2
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 1800.0) as group:
        runners: dict[str, Runner] = {}
        weights: dict[str, list[Tensor]] = {}
        with all_cores(env.plan.cpus) if env.bind_cores else nullcontext():
            for name in names:
                quant = PLAIN if name == EAGER else name
                with matmuls_of(name):
                    model = load_model(
                        *open_model(task["model"]), group, torch.bfloat16, quant=parse_quant(quant)
                    )
                    runner = make_runner(model, group, length, False, task["batch"])
                    if name != EAGER:
                        compile_now(runner, model, (GREEDY, EXTEND))
                    warm_up(runner, (EXTEND, GREEDY))
                runners[name], weights[name] = runner, weights_read(model)
        prompt = tuple(i % 100 for i in range(SHORT))
        bare = weights[names[0]]
        read_s = []
        token_s: dict[str, list[float]] = {name: [] for name in names}
        prompt_s: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(task["samples"]):
            read_s.append(_read(bare, group))
            for name, runner in runners.items():
                with matmuls_of(name):
                    token_s[name].append(token_seconds(runner, prompt, task["batch"], task["tokens"]))
                    prompt_s[name].append(_prompt(runner, task["prompt"], group))
        if group.rank == 0:
            size = sum(weight.nbytes for weight in bare)
            found = {
                "read_s_per_byte": [seconds / size for seconds in read_s],
                "variants": [
                    {
                        "name": name,
                        "weight_bytes": sum(each.nbytes for each in weights[name]),
                        "token_s": token_s[name],
                        "prompt_s": prompt_s[name],
                    }
                    for name in names
                ],
            }
            Path(task["out"]).write_text(json.dumps(found))
    return 0


@contextmanager
def matmuls_of(variant: str) -> Iterator[None]:
    """In this context, the EAGER variant uses torch's own matmuls; others use Yoke's kernels."""
    if variant != EAGER:
        yield
        return
    with (
        mock.patch("tp.layers.prefers_packed", return_value=False),
        mock.patch("tp.layers.linear", F.linear),
    ):
        yield


def _read(weights: list[Tensor], group: Group) -> float:
    """Seconds to read all weights once, on the slowest rank."""
    ops.barrier(group)
    start = time.perf_counter()
    for weight in weights:
        torch.ops.yoke_kernels.read(weight)
    return slowest(time.perf_counter() - start, group)


def _prompt(runner: Runner, prompt: int, group: Group) -> float:
    """Seconds to prefill `prompt` tokens, in the engine's chunks, on the slowest rank."""
    ops.barrier(group)
    start = time.perf_counter()
    for first in range(0, prompt, runner.chunk):
        last = min(first + runner.chunk, prompt)
        tokens = [i % 100 for i in range(first, last)]
        extend(runner, tokens, range(first, last), [0] * (last - first), [last - first - 1])
    return slowest(time.perf_counter() - start, group)
