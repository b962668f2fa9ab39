"""Compile a tiny model's steps and print what the compiler saw: breaks, collectives, recompiles; and
what a compiled step says where a rank does not come."""

from __future__ import annotations

import json
import time

import torch
from torch._dynamo.utils import counters

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, Rendezvous, open_group, set_timeout
from engine.loop import generate
from engine.requests import Request
from engine.steps import EXTEND, GREEDY, Runner, make_runner, warm_up
from models.config import expected_shapes
from models.load import load_model
from models.presets import PRESETS
from weights.formats.random_io import random_checkpoint

COLLECTIVES = {
    "yoke::all_reduce",
    "yoke::all_reduce_add_rms_norm",
    "yoke::all_gather",
    "_c10d_functional::all_reduce",
    "_c10d_functional::all_gather_into_tensor",
    "yoke::argmax",
}


def main(env: RankSettings, payload: str) -> int:
    config = PRESETS["tiny"]
    graphs: list[list[str]] = []

    def record(graph: torch.fx.Graph) -> None:
        # Operators whose order is kept are wrapped: (token, operator, arguments...).
        effects = torch.ops.higher_order.with_effects
        targets = (n.args[1] if n.target is effects else n.target for n in graph.nodes)
        names = (getattr(target, "_schema", None) for target in targets)
        graphs.append([schema.name for schema in names if schema and schema.name in COLLECTIVES])

    # A pass without an identity keeps the disk cache out: every graph is really compiled here.
    torch._inductor.config.post_grad_custom_post_pass = record
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 300.0) as group:
        weights = random_checkpoint(expected_shapes(config), seed=1)
        model = load_model(config, weights, group, getattr(torch, json.loads(payload)["dtype"]))
        runner = make_runner(model, group, 1024, compiled=True, num_rows=2)
        warm_up(runner, (EXTEND, GREEDY))
        compiled = dict(counters["stats"])
        # One call, several, and the borders between them; one prompt, two and three for two rows.
        with torch.compiler.set_stance("fail_on_recompile"):
            for lengths in ((1,), (2,), (3, 50), (128, 1, 129), (511,), (512, 2), (513,), (1000, 3)):
                generate(runner, [Request((7,) * length, 5) for length in lengths])
        after = dict(counters["stats"])
        failure = left_alone(runner, group) if env.backend == "shm" else ""
        if env.rank == 0:
            print(
                json.dumps(
                    {
                        "graphs": graphs,
                        "breaks": dict(counters["graph_break"]),
                        "compiled": compiled,
                        "after": after,
                        "failure": failure,
                    }
                )
            )
    return 0


@torch.no_grad()
def left_alone(runner: Runner, group: Group) -> str:
    """The error that rank 0 gets when it alone runs a decode step."""
    ops.barrier(group)
    set_timeout(group, 0.5)
    if group.rank != 0:
        time.sleep(2)
        return ""
    try:
        runner.steps[GREEDY](torch.tensor([7, 7]), torch.tensor([0, 0]))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "nothing"
