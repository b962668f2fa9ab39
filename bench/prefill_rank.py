"""The part of bench/prefill.py that runs in every rank: prefills, and the peak of the cores."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, Rendezvous, open_group
from engine.background import compile_now
from engine.compiling import use_cache_folder
from engine.opening import all_cores
from engine.steps import EXTEND, Runner, extend, make_runner, warm_up
from kernels.load import load_kernels
from models.config import ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import load_model
from models.presets import PRESETS
from weights.formats.random_io import random_checkpoint

PEAK_SECONDS = 0.1  # of one sample
PROFILED = 3  # prompts
# Makes the profiler record the kernels that inductor compiles.
RECORDED_KERNELS = {"cpp.enable_kernel_profile": True}


@torch.no_grad()
def main(env: RankSettings, payload: str) -> int:
    """Measure as the payload says; rank 0 writes the result as JSON into the payload's file."""
    task = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    use_cache_folder()
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    config, prompt = PRESETS[task["model"]], task["prompt"]
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 1800.0) as group:
        if not load_kernels():
            raise RuntimeError("the bound cannot be measured without a C++ compiler: install one")
        model = load_model(config, random_checkpoint(expected_shapes(config), 0), group, torch.bfloat16)
        with (
            all_cores(env.plan.cpus) if env.bind_cores else nullcontext(),
            torch._inductor.config.patch(RECORDED_KERNELS if task["profile"] else {}),
        ):
            runner = make_runner(model, group, prompt + 1, task["profile"] and not task["eager"])
            if not (task["eager"] or task["profile"]):
                compile_now(runner, model, (EXTEND,))
            warm_up(runner, (EXTEND,))
        if prompt > runner.chunk:
            raise RuntimeError(f"--prompt {prompt}: a prefill call has at most {runner.chunk} tokens")
        run(runner, prompt)
        rounds = _rounds()
        work, done = (_sum(count, group) for count in operations(model, config, prompt))
        prompt_s, peaks = [], []
        for _ in range(task["samples"]):
            ops.barrier(group)
            start = time.perf_counter()
            at_once = torch.ops.yoke_kernels.peak(rounds)
            peaks.append(_sum(at_once / (time.perf_counter() - start), group))
            ops.barrier(group)
            start = time.perf_counter()
            run(runner, prompt)
            seconds = torch.tensor([time.perf_counter() - start])
            prompt_s.append(float(ops.all_gather(seconds, group).max()))
        parts = where_time_goes(runner, prompt) if task["profile"] else None
        if group.rank == 0:
            found = {"prompt_s": prompt_s, "peak_per_s": peaks, "operations": work, "done": done}
            Path(task["out"]).write_text(json.dumps({**found, "parts": parts}))
    return 0


def run(runner: Runner, prompt: int) -> None:
    """Prefill a prompt of `prompt` tokens as the engine does, up to the logits of the last token."""
    extend(runner, [i % 100 for i in range(prompt)], range(prompt), [0] * prompt, [prompt - 1])


def where_time_goes(runner: Runner, prompt: int) -> dict[str, float]:
    """Self time in seconds of each operator and compiled kernel of this rank in a prefill; matmuls are
    separated by shape. The minimum over PROFILED prompts. A collective waits for the slowest rank."""
    least: dict[str, float] = {}
    for _ in range(PROFILED):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            run(runner, prompt)
        for event in seen.key_averages(group_by_input_shape=True):
            name = event.key
            if name in ("yoke_kernels::linear", "yoke_kernels::quant_linear"):
                name += f" {event.input_shapes[1]}"
            least[name] = min(least.get(name, float("inf")), event.self_cpu_time_total / 1e6)
    return dict(sorted(least.items(), key=lambda item: -item[1]))


def operations(model: Decoder, config: ModelConfig, prompt: int) -> tuple[float, float]:
    """The floating-point operations of this rank for a prompt: matmuls with weights (the head for one
    token) and attention over all earlier tokens (windows are ignored). Returns the operations of the
    model, and those really done: after its attention, the last layer processes only one token."""
    head = model.layout.vocab_block * config.dim
    seen = prompt * (prompt + 1) // 2
    heads = model.layout.heads.q_stop - model.layout.heads.q_start
    attention = 4 * config.num_layers * heads * config.head_dim * seen
    whole = 2.0 * (_numbers(model.layers) * prompt + head) + attention
    last: Any = model.layers[-1]
    return whole, whole - 2.0 * (_numbers(last.attention.out) + _numbers(last.mlp)) * (prompt - 1)


def _numbers(module: nn.Module) -> int:
    """The number of weights that a token is multiplied with, plain or packed."""
    packed = sum(
        each.nbytes // 2 for name, each in module.named_buffers() if name.endswith("packed_data")
    )
    return packed + sum(each.numel() for each in module.parameters() if each.dim() == 2)


def _rounds() -> int:
    torch.ops.yoke_kernels.peak(100_000)
    start = time.perf_counter()
    torch.ops.yoke_kernels.peak(100_000)
    return int(100_000 * PEAK_SECONDS / (time.perf_counter() - start)) + 1


def _sum(value: float, group: Group) -> float:
    return float(ops.all_gather(torch.tensor([value], dtype=torch.float64), group).sum())
