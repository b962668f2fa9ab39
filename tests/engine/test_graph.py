"""What the compiler sees of a step: one graph, the expected collectives, nothing to compile later. And
what the compiled step says when another rank does not come."""

from __future__ import annotations

import json
import re

import pytest

from models.presets import PRESETS
from tests.running import RunRanks


@pytest.mark.slow
@pytest.mark.parametrize(("comm", "dtype"), [("shm", "bfloat16"), ("gloo", "float32")])
def test_steps_are_whole_graphs_and_later_prompts_compile_nothing(
    comm: str, dtype: str, run_ranks: RunRanks
) -> None:
    code, out, err = run_ranks("graph", 2, comm, dtype=dtype)
    assert code == 0, err
    seen = json.loads(out)
    assert seen["breaks"] == {}
    assert seen["compiled"] == seen["after"]
    assert len(seen["graphs"]) == 2  # the prompt step and the decode step
    layers = PRESETS["tiny"].num_layers
    ends = []
    for graph in seen["graphs"]:
        sums = [name for name in graph if "all_reduce" in name]
        assert len(sums) == 2 * layers + 1  # attention and MLP of each layer, and the embedding
        assert graph[: len(sums)] == sums
        ends.append(graph[len(sums) :])
    gather = "yoke::all_gather" if comm == "shm" else "_c10d_functional::all_gather_into_tensor"
    # The prompt step gathers logits; the decode step compares the ranks' candidates.
    assert ends == [[gather], ["yoke::argmax"] if comm == "shm" else [gather, gather]]
    if comm == "shm":
        assert re.match(r"all_reduce.*rank 0 waited 0.5 s for rank 1", seen["failure"])
