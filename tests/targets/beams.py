"""Search with beams on real ranks, which must take the same steps; rank 0 prints what it found."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, Rendezvous, open_group
from engine.beam_plan import Search
from engine.beams import find
from engine.steps import BEAMS, Runner, make_runner
from models.load import config_of, load_model
from weights.open import open_checkpoint


def main(env: RankSettings, payload: str) -> int:
    job = json.loads(payload)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 120.0) as group:
        checkpoint = open_checkpoint(Path(job["folder"]))
        model = load_model(config_of(checkpoint), checkpoint, group, torch.float32)
        runner = _compared(make_runner(model, group, 64, False, job["width"]), group)
        search = Search(job["width"], job["penalty"], job["count"], frozenset(job["stops"]))
        found = [find(runner, prompt, search) for prompt in job["prompts"]]
        if group.rank == 0:
            print(json.dumps([[asdict(h) for h in outcome.hypotheses] for outcome in found]))
        else:
            assert not any(outcome.hypotheses for outcome in found)
    return 0


def _compared(runner: Runner, group: Group) -> Runner:
    """The same, with an assertion that all ranks feed each step the same."""
    plain = runner.steps[BEAMS]

    def step(*inputs: torch.Tensor) -> torch.Tensor:
        mine = torch.cat([x.flatten().to(torch.int64) for x in inputs])
        assert all(torch.equal(other, mine) for other in ops.all_gather(mine, group))
        return plain(*inputs)

    return replace(runner, steps=runner.steps | {BEAMS: step})
