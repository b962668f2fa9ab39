"""Texts with and without draft tokens, in real ranks; if compiled, also whether anything was compiled
later."""

from __future__ import annotations

import json
from contextlib import nullcontext

import torch

from base.rank_settings import RankSettings
from comm.group import Group, Rendezvous, open_group
from engine import speculation
from engine.loop import generate
from engine.requests import Answer, Request
from engine.steps import EXTEND, GREEDY, Runner, make_runner, warm_up
from models.config import expected_shapes
from models.load import load_model
from models.presets import PRESETS
from models.sampling import Sampling
from weights.formats.random_io import random_checkpoint

PROMPTS = ((1, 2, 3, 1, 2), (7,), tuple(range(40)), (9, 9, 9), (5, 6) * 30, (11, 12, 13))
SAMPLINGS = (Sampling(), Sampling(temperature=0.3, seed=5), Sampling(repetition_penalty=1.3))


def runner_of(group: Group, seed: int, compiled: bool) -> Runner:
    config = PRESETS["tiny"]
    checkpoint = random_checkpoint(expected_shapes(config), seed)
    model = load_model(config, checkpoint, group, torch.float32)
    return make_runner(model, group, 100, compiled, num_rows=3)


def main(env: RankSettings, payload: str) -> int:
    compiled = json.loads(payload)["compiled"]
    requests = [
        Request(prompt, 12 + 7 * (i % 3), SAMPLINGS[i % len(SAMPLINGS)])
        for i, prompt in enumerate(PROMPTS)
    ]
    torch.set_num_threads(1)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 300.0) as group:
        model, small = runner_of(group, 1, compiled), runner_of(group, 2, compiled)
        warm_up(model, (EXTEND,))
        warm_up(small, (EXTEND, GREEDY))
        found: dict[str, list[Answer]] = {}
        with torch.compiler.set_stance("fail_on_recompile") if compiled else nullcontext():
            found["lookup"] = speculation.generate(model, requests)
            found["small"] = speculation.generate(model, requests, draft=small)
        if not compiled:
            found["plain"] = generate(model, requests)
        if group.rank == 0:
            names = ("tokens", "drafted", "accepted")
            print(
                json.dumps(
                    {
                        how: {name: [getattr(answer, name) for answer in answers] for name in names}
                        for how, answers in found.items()
                    }
                )
            )
    return 0
