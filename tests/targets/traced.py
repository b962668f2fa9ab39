"""The operators as torch sees them: schemas, fake kernels, and compiled functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, Rendezvous, open_group

QUICK = ("test_schema", "test_faketensor")
EVERY = (*QUICK, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


def check_operators(group: Group) -> None:
    """Every operator and overload by torch's own checks, with several shapes and memories."""
    generator = torch.Generator().manual_seed(group.rank)
    n, handle, yoke = group.size, group.handle, torch.ops.yoke
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2 * n, 6, generator=generator).to(dtype)
        for y in (
            x,
            x[:, ::2],
            x[::n].t(),
            x.unsqueeze(0).transpose(0, 1),
            torch.empty(n, 0, dtype=dtype),
        ):
            calls: list[tuple[Any, tuple[Any, ...], dict[str, Tensor]]] = [
                (yoke.all_reduce.default, (y, handle), {}),
                (yoke.all_reduce.out, (y, handle), {"out": torch.empty_like(y)}),
                (yoke.broadcast.default, (y, 0, handle), {}),
                (yoke.broadcast.out, (y, 0, handle), {"out": torch.empty_like(y)}),
                (yoke.all_gather.default, (y, n, handle), {}),
                (yoke.all_gather.out, (y, n, handle), {"out": y.new_empty(n, *y.shape)}),
            ]
            if y.shape[0] % n == 0:
                part = y.new_empty(y.shape[0] // n, *y.shape[1:])
                calls += [
                    (yoke.reduce_scatter.default, (y, n, handle), {}),
                    (yoke.reduce_scatter.out, (y, n, handle), {"out": part}),
                ]
            weight = torch.ones(y.shape[-1], dtype=dtype)
            calls.append(
                (yoke.all_reduce_add_rms_norm.default, (y, y.clone(), weight, 1e-5, handle), {})
            )
            if y.dim() == 2 and y.shape[1] > 1:
                calls.append((yoke.argmax.default, (y, 0, handle), {}))
                calls.append((yoke.topk.default, (y, 2, 0, handle), {}))
            for operator, arguments, keywords in calls:
                tests = EVERY if y is x and dtype == torch.float32 else QUICK
                torch.library.opcheck(operator, arguments, keywords, test_utils=tests)


def compiled(function: Callable[..., Any], *arguments: Tensor) -> tuple[list[torch.fx.Graph], Any]:
    """The graphs that torch makes of a function, after it has made all mutation explicit, and the
    function that runs them."""
    graphs: list[torch.fx.Graph] = []

    def record(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    run = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    with torch.inference_mode():
        run(*arguments)
    return graphs, run


def names(graph: torch.fx.Graph) -> list[str]:
    """What is called, in order. One with an effect is called through another, which orders it."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function":
            inner = [a for a in node.args if isinstance(a, torch._ops.OpOverload)]
            found.append(str(inner[0] if inner else node.target))
    return found


def make_block(group: Group) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Two layers, each an attention-like and an MLP-like pair of a column- and a row-split matrix."""
    generator = torch.Generator().manual_seed(11)
    width, inner = 32, 48
    weights = []
    for _ in range(4):
        first = torch.randn(inner * group.size, width, generator=generator) / width**0.5
        second = torch.randn(width, inner * group.size, generator=generator) / inner**0.5
        weights += [first.chunk(group.size)[group.rank], second.chunk(group.size, 1)[group.rank]]
    norm = torch.ones(width)

    def block(x: Tensor, *weights: Tensor) -> Tensor:
        residual, hidden = x, x
        for layer in range(4):
            part = (hidden @ weights[2 * layer].t()).relu() @ weights[2 * layer + 1].t()
            hidden, residual = ops.all_reduce_add_rms_norm(part, residual, norm, 1e-5, group)
        logits = hidden @ weights[0].t()
        return ops.argmax(logits, group.rank * inner, group)

    return block, weights


def check_block(group: Group) -> None:
    """One graph, its collectives and nothing else around them."""
    block, weights = make_block(group)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    graphs, run = compiled(block, x, *weights)
    assert len(graphs) == 1, "graph breaks, or recompiles"
    called = names(graphs[0])
    assert called.count("yoke.all_reduce_add_rms_norm.default") == 4, called
    assert called.count("yoke.argmax.default") == 1, called
    assert not any("clone" in name or "copy" in name for name in called), called
    with torch.inference_mode():
        assert torch.equal(run(x, *weights), block(x, *weights))
    # The same by torch's own compiler.
    fast = torch.compile(block, fullgraph=True)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(fast(x, *weights), block(x, *weights))
    explained = torch._dynamo.explain(block)(x, *weights)
    assert explained.graph_count == 1 and explained.graph_break_count == 0


def check_functions(group: Group) -> None:
    """Functional operators leave no copies; `out` forms work; what is not used is not left out."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(group.rank))

    def functional(x: Tensor) -> Tensor:
        y = ops.all_reduce(x * 2, group).relu()
        z = ops.broadcast(y + x, 1, group)
        own = ops.reduce_scatter(ops.all_gather(z, group).flatten(0, 1), group)
        return own + ops.all_reduce(x, group)  # of an input of the graph

    graphs, run = compiled(functional, x)
    called = names(graphs[0])
    assert [name.split(".")[1] for name in called if name.startswith("yoke")] == [
        "all_reduce",
        "broadcast",
        "all_gather",
        "reduce_scatter",
        "all_reduce",
    ]
    assert not any("clone" in name or "copy" in name for name in called), called
    before = x.clone()
    for function in (run, torch.compile(functional, fullgraph=True)):
        torch.testing.assert_close(function(x), functional(x))
        assert torch.equal(x, before)

    def written(x: Tensor, out: Tensor) -> Tensor:
        own = torch.empty_like(x)
        ops.all_reduce(x, group, out=own)
        ops.broadcast(own + 1, 0, group, out=out)
        gathered = x.new_empty(group.size, *x.shape)
        ops.all_gather(own, group, out=gathered)
        part = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
        ops.reduce_scatter(gathered[0], group, out=part)
        ops.all_reduce(own, group, out=own)
        return own + gathered.sum(0) + part.sum()

    fast, out, wanted_out = (
        torch.compile(written, fullgraph=True),
        torch.zeros_like(x),
        torch.zeros_like(x),
    )
    for _ in range(3):
        torch.testing.assert_close(fast(x, out), written(x, wanted_out))
        assert torch.equal(out, wanted_out) and torch.equal(x, before)

    def unused(x: Tensor) -> Tensor:
        if group.rank == 0:  # graphs of the ranks differ, their collectives must not
            ops.all_reduce(x, group)
        else:
            x = x + ops.all_reduce(x, group) * 0
        ops.barrier(group)
        return ops.all_gather(x, group)

    whole = torch.compile(unused, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(whole(x), unused(x))
    ops.barrier(group)


CASES = {"operators": check_operators, "block": check_block, "functions": check_functions}


def main(env: RankSettings, payload: str) -> int:
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with open_group(env.rank, env.world_size, env.backend, rendezvous, 120.0) as group:
        for case in json.loads(payload)["cases"]:
            torch._dynamo.reset()
            CASES[case](group)
            ops.barrier(group)
            if env.rank == 0:
                print(case, flush=True)
    return 0
