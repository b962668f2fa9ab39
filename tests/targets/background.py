"""Ranks whose steps are compiled during the run: the change, a start that finds packages, a failure."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
import torch

from base.caches import clear_caches, read_caches
from base.errors import LaunchError
from base.rank_settings import RankSettings
from comm.group import Group, Rendezvous, open_group, set_timeout
from engine.background import Upgrade, advance, start_upgrade, stop
from engine.loop import generate
from engine.packages import MANIFEST, StepShape, describe, key_of, packages_folder
from engine.requests import Request
from engine.steps import EXTEND, GREEDY, Runner, make_runner
from models.config import expected_shapes
from models.decoder import Decoder
from models.load import load_model
from models.presets import PRESETS
from tests.targets.graph import left_alone
from weights.formats.random_io import random_checkpoint

CONFIG = replace(PRESETS["tiny"], num_layers=1)
REQUESTS = [Request((7, 8, 9), 20), Request((3,), 12), Request(tuple(range(40)), 9)]
DEADLINE_S = 500.0


def main(env: RankSettings, payload: str) -> int:
    torch.set_num_threads(1)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 300.0) as group:
        set_timeout(group, 300.0)
        wanted = made(plain(group)[0])
        changed_while_running(group, wanted)
        found_at_the_start(group, wanted)
        failed_on_one_rank(group, wanted)
        failure = left_alone(started(group)[0], group)  # its step is one of a package
        assert group.rank or re.match(r"all_reduce.*rank 0 waited 0.5 s for rank 1", failure), failure
    print("done")
    return 0


def plain(group: Group) -> tuple[Runner, Decoder]:
    weights = random_checkpoint(expected_shapes(CONFIG), 1)
    model = load_model(CONFIG, weights, group, torch.float32)
    return make_runner(model, group, 64, compiled=False, num_rows=2), model


def started(group: Group) -> tuple[Runner, Upgrade]:
    runner, model = plain(group)
    upgrade = start_upgrade(runner, model, (GREEDY, EXTEND))
    runner.at_check.append(lambda: advance(upgrade))
    return runner, upgrade


def made(runner: Runner) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in generate(runner, REQUESTS)]


def changed_while_running(group: Group, wanted: list[tuple[int, ...]]) -> None:
    runner, upgrade = started(group)
    assert upgrade.process is not None
    (packages_folder() / "old.seconds").touch()
    steps = [found for found in read_caches(packages_folder().parent) if found.kind.name == "steps"]
    with pytest.raises(LaunchError, match="steps is in use"):  # what may be loaded is not cleared
        clear_caches(steps)
    plain_steps = dict(runner.steps)
    until = time.monotonic() + DEADLINE_S
    while upgrade.packages:
        assert time.monotonic() < until, upgrade.packages
        found = made(runner)
        assert group.rank or found == wanted, (found, wanted, upgrade.packages)
    assert list(upgrade.done_s) == [GREEDY, EXTEND]
    assert all(runner.steps[name] is not plain_steps[name] for name in (GREEDY, EXTEND))
    found = made(runner)
    assert group.rank or found == wanted, (found, wanted)
    assert upgrade.process.wait(60) == 0


def found_at_the_start(group: Group, wanted: list[tuple[int, ...]]) -> None:
    runner, upgrade = started(group)
    assert upgrade.process is None and not upgrade.packages, upgrade
    found = made(runner)
    assert group.rank or found == wanted, (found, wanted)


def failed_on_one_rank(group: Group, wanted: list[tuple[int, ...]]) -> None:
    """Rank 1's package of one step is damaged, and compiling it again fails."""
    runner, model = plain(group)
    if group.rank == 1:
        shape = StepShape(runner.num_rows, runner.cache_len, runner.chunk)
        package = packages_folder() / key_of(describe(model), EXTEND, shape)
        (package / MANIFEST).write_text("{")
    runner, upgrade = started(group)
    assert list(upgrade.packages) == [EXTEND]
    assert (upgrade.process is not None) == (group.rank == 1)
    stop(upgrade)
    until = time.monotonic() + DEADLINE_S
    while upgrade.packages:
        assert time.monotonic() < until
        found = made(runner)
        assert group.rank or found == wanted, (found, wanted)
    assert GREEDY in upgrade.done_s and EXTEND not in upgrade.done_s
