"""Random sequences of all operators between real processes.

`python -m tests.child sequences CASE [SEED]` forks the ranks.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from comm import ops
from comm.group import Group, Rendezvous, open_group
from comm.sizes import slot_bytes
from tests.targets.draws import (
    DRESSES,
    MOVABLE,
    SUMMABLE,
    Session,
    dress,
    random_shape,
    reference_sum,
    same,
)
from tests.targets.forking import Report, listen, new_session, run_forked, shm_group

NO_CHOICE = {"nan": -1, "inf": -2, "-inf": -3}


def one_operator(s: Session, group: Group, other: Group, gloo: Group | None) -> None:
    """Draw an operator and its arguments, call it, compare. `other` holds the same ranks."""
    draw = s.draw
    name = draw.choice(("all_reduce", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "norm",
                        "best", "barrier"))  # fmt: skip
    if name == "barrier":
        ops.barrier(group)
    elif name == "norm":
        check_norm(s, group, other)
    elif name == "best":
        check_best(s, group, gloo)
    else:
        check_moved(s, name, group, other, gloo)


def check_moved(s: Session, name: str, group: Group, other: Group, gloo: Group | None) -> None:
    """Sums, gathers and broadcasts, with every form of memory, and where their results may go."""
    draw = s.draw
    dtype = draw.choice(MOVABLE if name in ("all_gather", "broadcast") else SUMMABLE)
    shape = random_shape(draw, slot_bytes(s.size), dtype.itemsize)
    if name == "reduce_scatter":
        rest = shape if len(shape) < 2 else shape[:1]
        shape = (s.size * draw.randrange(0, 4), *(min(n, 4000) for n in rest))
    root = draw.randrange(s.size)
    everyone = s.numbers(shape, dtype)
    x = dress(everyone[s.rank], draw.choice(DRESSES))
    calls: dict[str, Callable[..., Tensor]] = {
        "all_reduce": lambda g, **out: ops.all_reduce(x, g, **out),
        "reduce_scatter": lambda g, **out: ops.reduce_scatter(x, g, **out),
        "all_gather": lambda g, **out: ops.all_gather(x, g, **out),
        "broadcast": lambda g, **out: ops.broadcast(x, root, g, **out),
    }
    call = calls[name]
    if name == "all_reduce":
        wanted = reference_sum(everyone)
    elif name == "reduce_scatter":
        wanted = reference_sum(everyone).chunk(s.size)[s.rank] if shape[0] else everyone[0]
    elif name == "all_gather":
        wanted = torch.stack(everyone)
    else:
        wanted = everyone[root]
    about = (name, s.size, dtype, shape, x.stride())
    result = call(group)
    assert same(result, wanted), about
    assert same(x, everyone[s.rank]), about
    assert result.is_contiguous() or s.size == 1, about
    if name != "reduce_scatter":
        s.shared(result)
    if draw.randrange(3) == 0:
        assert same(call(other), result), about  # the other algorithm
    if gloo is not None and dtype == torch.float32 and draw.randrange(2) == 0:
        torch.testing.assert_close(call(gloo), result, rtol=1e-5, atol=1e-5, msg=str(about))
    out = dress(torch.zeros_like(wanted), draw.choice(DRESSES[:4]))
    assert call(group, out=out) is out and same(out, wanted), about
    # (torch itself cannot write into a lazy conjugate through an operator that returns nothing.)
    if name in ("all_reduce", "broadcast") and draw.randrange(2) == 0 and not x.is_conj():
        assert call(group, out=x) is x and same(x, wanted), about


def check_norm(s: Session, group: Group, other: Group) -> None:
    dtype = s.draw.choice((torch.float32, torch.bfloat16, torch.float16))
    lead = s.draw.choice([(), (1,), (0,), (5,), (2, 3), (70,)])
    width = s.draw.choice([1, 7, 64, 577, 4096])
    everyone = s.numbers((*lead, width), dtype)
    residual, weight = s.numbers((*lead, width), dtype)[0], s.numbers((width,), dtype)[0]
    how = s.draw.choice(DRESSES)
    x, base = dress(everyone[s.rank], how), dress(residual, how)
    normed, new_residual = ops.all_reduce_add_rms_norm(x, base, weight, 1e-5, group)
    total = everyone[0].float()
    for part in everyone[1:]:
        total = total + part.float()
    wanted = (residual.float() + total).to(dtype)
    about = (s.size, dtype, lead, width, how)
    assert same(new_residual, wanted), about
    assert same(x, everyone[s.rank]) and same(base, residual), "an input was changed"
    full = wanted.float()
    scaled = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + 1e-5)
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        normed.float(), scaled.to(dtype).float() * weight.float(), rtol=tolerance, atol=tolerance
    )
    for again, first in zip(
        ops.all_reduce_add_rms_norm(x, base, weight, 1e-5, other), (normed, new_residual), strict=True
    ):
        assert same(again, first), about  # the other algorithm
    s.shared(normed)


def check_best(s: Session, group: Group, gloo: Group | None) -> None:
    """argmax and topk of a row that is split unevenly, with ties, infinities and NaN."""
    draw = s.draw
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    rows = draw.choice([0, 1, 1, 3, 20])
    columns = [draw.choice([0, 1, 2, 50, 3001]) for _ in range(s.size)]
    columns[draw.randrange(s.size)] += 1
    total = sum(columns)
    k = draw.randrange(1, min(total, 60) + 1)
    generator = torch.Generator().manual_seed(draw.randrange(1 << 40))
    whole = torch.randn(rows, total, generator=generator)
    kind = draw.randrange(5)
    if kind == 0:  # few values, so ties
        whole = whole.round()
    elif kind == 1:
        whole = torch.where(whole > 0.7, torch.nan, whole)
    elif kind == 4:  # sums that left the range of their dtype
        whole[:, draw.randrange(total)] = torch.inf
    elif kind == 2:  # a masked row: what is left over is minus infinity
        whole = torch.where(whole > -1.5, -torch.inf, whole)
    whole = whole.to(dtype)
    offset = sum(columns[: s.rank])
    mine = whole[:, offset : offset + columns[s.rank]]
    wanted_values, wanted = whole.float().sort(dim=1, descending=True, stable=True)
    largest = zip(wanted[:, 0].tolist(), wanted_values[:, 0].tolist(), strict=True)
    chosen = [i if math.isfinite(best) else NO_CHOICE[str(best)] for i, best in largest]
    assert ops.whole_argmax(whole).tolist() == chosen
    about = (s.size, dtype, rows, columns, k, kind)
    for g in (group, gloo):
        if g is None:
            continue
        values, indices = ops.topk(mine, k, offset, g)
        assert torch.equal(indices, wanted[:, :k]), (about, g.backend)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, wanted_values[:, :k], rtol=0, atol=0, equal_nan=True)
        assert ops.argmax(mine, offset, g).tolist() == chosen, (about, g.backend)
    if group.backend == "shm":
        s.shared(indices)


def sequence(s: Session, group: Group, other: Group, gloo: Group | None, steps: int) -> None:
    for _ in range(steps):
        first, second = s.draw.sample((group, other), 2)
        one_operator(s, first, second, gloo)
    # Ranks that hold other bits, or other streams of random numbers, are found here.
    digest = torch.frombuffer(bytearray(s.digest.digest()), dtype=torch.uint8)
    for theirs in ops.all_gather(digest, group):
        assert torch.equal(theirs, digest), "ranks hold different bits"


@contextlib.contextmanager
def two_groups(rank: int, size: int, session: str) -> Iterator[tuple[Group, Group]]:
    """One that takes as much as it can in one step, and one that takes all in parts."""
    with (
        shm_group(rank, size, session) as large,
        shm_group(rank, size, session, label="1", switch_bytes=1) as parts,
    ):
        if size > 1:
            assert torch.ops.yoke.shm_switch_bytes(large.handle) == slot_bytes(size)
            assert torch.ops.yoke.shm_switch_bytes(parts.handle) == 1
        yield large, parts


def worlds(seed: str = "1000") -> None:
    """Sequences in worlds of 1 to 8, with gloo beside them, with one thread and several."""
    most, session = 8, new_session()
    with listen() as server:

        def body(rank: int, report: Report) -> float:
            torch.set_num_threads(1)
            meeting = Rendezvous(
                session, port=server.getsockname()[1], store_fd=server.fileno() if rank == 0 else None
            )
            with open_group(rank, most, "gloo", meeting, 100.0):
                for size in range(most, 0, -1):
                    between = dist.new_group(list(range(size)))
                    if rank >= size:
                        continue
                    gloo = (
                        Group(rank, size, "gloo", name=between.group_name) if size > 1 else Group(0, 1)
                    )
                    torch.set_num_threads(1 + size % 3)
                    with two_groups(rank, size, f"{session}-{size}") as (large, parts):
                        s = Session(rank, size, random.Random(int(seed) + size))
                        if size == 1:
                            large, parts = Group(0, 1), Group(0, 1)
                        sequence(s, large, parts, gloo, 45)
                dist.barrier()
            return 0.0

        run_forked(most, body, 300.0)


def threads(seed: str = "1000") -> None:
    """Two threads of each rank, each with a group of its own, at the same time; and one that is shared
    by two threads, of which one comes after the other."""
    size, session = 3, new_session()

    def body(rank: int, report: Report) -> None:
        torch.set_num_threads(2)
        failures: list[BaseException] = []

        def run(number: int) -> None:
            try:
                with two_groups(rank, size, f"{session}-{number}") as (large, parts):
                    sequence(
                        Session(rank, size, random.Random(int(seed) + number)), large, parts, None, 30
                    )
            except BaseException as error:
                failures.append(error)

        started = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        for failure in failures:
            raise failure
        with shm_group(rank, size, session) as group:
            together = [threading.Thread(target=ops.barrier, args=(group,)) for _ in range(4)]
            for thread in together:
                thread.start()
            for thread in together:
                thread.join()
            assert ops.all_reduce(torch.ones(2), group).tolist() == [3.0, 3.0]

    run_forked(size, body)


CASES = {"worlds": worlds, "threads": threads}
