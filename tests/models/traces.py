"""A family's two steps as torch.compile sees them: whole graphs, equal to eager, with collectives."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from comm.group import Group
from comm.shm import join_segment, load_extension
from models.config import ModelConfig
from models.decoder import Decoder
from tests.models.families import tokens


@contextmanager
def group_of_one() -> Iterator[Group]:
    """Shared memory with a single rank, whose sums are operators of the graph all the same."""
    load_extension()
    handle = join_segment(f"yoke-{secrets.token_hex(6)}-traces", 0, 1, 30.0, switch_bytes=1 << 16)
    try:
        yield Group(0, 1, "shm", handle=handle)
    finally:
        torch.ops.yoke.shm_close_group(handle)


def expected(config: ModelConfig) -> Counter[str]:
    """The collectives of a step of a rank alone: the embedding and the head need none."""
    match config.block:
        case "llama":
            return Counter({"all_reduce_add_rms_norm": 2 * config.num_layers})
        case "gemma":
            return Counter({"all_reduce": 2 * config.num_layers})
        case "parallel":
            return Counter({"all_reduce": config.num_layers})
    raise AssertionError(config.block)


@torch.no_grad()
def trace(model: Decoder) -> list[Counter[str]]:
    """The collectives in the graph of a prompt and in that of a token, with their numbers.

    Raises what torch raises of a step that is not one graph (its python code or its operators), and
    AssertionError where the graphs' logits are not those of the model as it is.
    """
    graphs: list[Counter[str]] = []
    run_eagerly = torch._dynamo.lookup_backend("aot_eager")

    def record(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        called = [node.target for node in module.graph.nodes]
        ours = [op for op in called if isinstance(op, torch._ops.OpOverload) and op.namespace == "yoke"]
        graphs.append(Counter(op._schema.name.removeprefix("yoke::") for op in ours))
        return run_eagerly(module, inputs)

    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, dynamic=False, backend=record)
    rows = tokens()[:1]
    arguments = [
        (rows[:, :16], torch.arange(16), torch.tensor([11])),
        (rows[:, 12:13], torch.tensor([12])),
    ]
    outputs = []
    for run in (model, step):
        model.setup(1, 32)
        outputs.append([run(*a) for a in arguments])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2, "a graph for the prompt and one for a token"
    return graphs
