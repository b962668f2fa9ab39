"""Random sequences of all operators between real processes, and other things that need many ranks.

`python -m tests.targets.sequences CASE [SEED]` forks the ranks. All draw from one seeded generator, so
each knows what the others contribute and what must come out.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from comm import ops
from comm.group import Group, Rendezvous, open_group
from comm.sizes import slot_bytes
from tests.targets.forking import Tell, listen, new_session, run_forked, shm_group

SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
SUMMABLE = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
MOVABLE = (
    *SUMMABLE,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.complex64,
    torch.float8_e4m3fn,
)

NO_CHOICE = {"nan": -1, "inf": -2, "-inf": -3}


@dataclass
class Session:
    """What a rank needs for a sequence. `digest` grows with every result that all ranks share."""

    rank: int
    size: int
    draw: random.Random
    digest: Any = field(default_factory=hashlib.sha256)

    def numbers(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """What each rank contributes."""
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 40))
        return [random_tensor(shape, dtype, generator) for _ in range(self.size)]

    def shared(self, result: Tensor) -> None:
        self.digest.update(bits(result).numpy().tobytes())


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype in (torch.int32, torch.int64):  # sums wrap around
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).mul(4).to(dtype)


def bits(x: Tensor) -> Tensor:
    plain = x.resolve_conj().resolve_neg().reshape(-1)
    return plain.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def reference_sum(everyone: list[Tensor]) -> Tensor:
    """In rank order; floats in fp32 with one rounding."""
    if not everyone[0].is_floating_point():
        return torch.stack(everyone).sum(0, dtype=everyone[0].dtype)
    total = everyone[0].float()
    for x in everyone[1:]:
        total = total + x.float()
    return total.to(everyone[0].dtype)


def dress(x: Tensor, how: str) -> Tensor:
    """The same numbers in other memory: shifted by an element, transposed, with gaps."""
    if how == "shifted":
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)
        memory[1:] = x.flatten()
        return memory[1:].view(x.shape)
    if how == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    if how == "gaps" and x.dim() > 0:
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "conjugate" and x.is_complex():
        return x.conj().resolve_conj().conj()
    return x.clone()


DRESSES = ("plain", "shifted", "transposed", "gaps", "conjugate")


def random_shape(draw: random.Random, slot: int, unit: int) -> tuple[int, ...]:
    """Mostly small and odd; now and then nothing, a scalar, about a buffer, or several."""
    kind = draw.randrange(14)
    if kind == 0:
        return draw.choice([(0,), (0, 3), (), (1,)])
    if kind == 1:
        return (slot // unit + draw.randrange(-1, 2),)
    if kind == 2:
        return (draw.randrange(slot // unit, 3 * slot // unit),)
    if kind < 7:
        return (draw.randrange(1, 20), draw.randrange(1, 90))
    return (draw.randrange(1, 3000),)


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


def worlds() -> None:
    """Sequences in worlds of 1 to 8, with gloo beside them, with one thread and several."""
    most, session = 8, new_session()
    with listen() as server:

        def body(rank: int, tell: Tell) -> float:
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
                        s = Session(rank, size, random.Random(SEED + size))
                        if size == 1:
                            large, parts = Group(0, 1), Group(0, 1)
                        sequence(s, large, parts, gloo, 45)
                dist.barrier()
            return 0.0

        run_forked(most, body, 300.0)


def crowd() -> None:
    """64 ranks, tiny messages."""
    session, size = new_session(), 64

    def body(rank: int, tell: Tell) -> None:
        torch.set_num_threads(1)
        with shm_group(rank, size, session) as group:
            for i, dtype in enumerate(SUMMABLE):
                s = Session(rank, size, random.Random(i))
                everyone = s.numbers((2 * i + 1,), dtype)
                assert same(ops.all_reduce(everyone[rank], group), reference_sum(everyone))
                assert same(ops.all_gather(everyone[rank], group), torch.stack(everyone))
                assert same(ops.broadcast(everyone[rank], 63 - i, group), everyone[63 - i])
            many = torch.arange(128.0).view(64, 2) + rank
            assert ops.reduce_scatter(many, group).tolist() == [
                [64.0 * (2 * rank + j) + 63 * 32 for j in range(2)]
            ]
            logits = torch.full((2, 1), float(rank % 7))
            assert ops.argmax(logits, rank, group).tolist() == [6, 6]

    run_forked(size, body, 200.0)


def large_messages() -> None:
    """64 MiB, and what is just above all buffers together, by two threads a rank."""
    size, session = 2, new_session()

    def body(rank: int, tell: Tell) -> None:
        torch.set_num_threads(2)
        slot = slot_bytes(size)
        with two_groups(rank, size, session) as (large, parts):
            for count, group in ((16 << 20, large), (2 * size * slot // 4 + 1, parts)):
                base = torch.arange(count, dtype=torch.int32).remainder(1013).float()
                x = base * (rank + 1)
                assert torch.equal(ops.all_reduce(x, group), base * 3)
                everyone = ops.all_gather(x, group)
                assert all(torch.equal(everyone[r], base * (r + 1)) for r in range(size))
                del everyone
                own = ops.reduce_scatter(x[: count // 2 * 2], group)
                assert torch.equal(own, (base * 3)[: count // 2 * 2].chunk(2)[rank])
                assert torch.equal(ops.broadcast(x, 1, group), base * 2)
                wide = x[: count // 4096 * 4096].view(-1, 4096)
                residual = base[: wide.numel()].view(-1, 4096)
                _, summed = ops.all_reduce_add_rms_norm(wide, residual, torch.ones(4096), 1e-5, group)
                assert torch.equal(summed, residual * 4)
                assert ops.all_reduce(x, group, out=x) is x
                assert torch.equal(x, base * 3)

    run_forked(size, body, 200.0)


def threads() -> None:
    """Two threads of each rank, each with a group of its own, at the same time; and one that is shared
    by two threads, of which one comes after the other."""
    size, session = 3, new_session()

    def body(rank: int, tell: Tell) -> None:
        torch.set_num_threads(2)
        failures: list[BaseException] = []

        def run(number: int) -> None:
            try:
                with two_groups(rank, size, f"{session}-{number}") as (large, parts):
                    sequence(Session(rank, size, random.Random(SEED + number)), large, parts, None, 30)
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


def refusals() -> None:
    """What cannot be is an error on every rank, before anybody waits, and the group goes on."""
    size, session = 2, new_session()

    def body(rank: int, tell: Tell) -> None:
        x = torch.randn(4, 6)
        with shm_group(rank, size, session) as group:
            yoke, handle = torch.ops.yoke, group.handle
            wrong: list[tuple[str, Callable[[], Any]]] = [
                ("out has shape", lambda: ops.all_reduce(x, group, out=torch.empty(4, 5))),
                ("out has shape", lambda: ops.all_reduce(x, group, out=torch.empty(4, 6).half())),
                ("out has shape", lambda: ops.all_gather(x, group, out=torch.empty(4, 6))),
                ("out has shape", lambda: ops.broadcast(x, 0, group, out=torch.empty(6, 4))),
                ("out has shape", lambda: ops.reduce_scatter(x, group, out=torch.empty(4, 6))),
                ("shares its memory", lambda: ops.reduce_scatter(x, group, out=x[:2])),
                (
                    "shares its memory",
                    lambda: (y := torch.empty(2, 6), ops.all_gather(y[0], group, out=y)),
                ),
                ("must be a multiple", lambda: ops.reduce_scatter(torch.ones(3), group)),
                ("must be a multiple", lambda: ops.reduce_scatter(torch.tensor(1.0), group)),
                ("over 3 ranks in a group of 2", lambda: yoke.all_gather(x, 3, handle)),
                ("over 3 ranks in a group of 2", lambda: yoke.reduce_scatter(torch.ones(3), 3, handle)),
                ("broadcast from rank 2", lambda: ops.broadcast(x, 2, group)),
                ("broadcast from rank -1", lambda: ops.broadcast(x, -1, group)),
                ("sums float32", lambda: ops.all_reduce(x.double(), group)),
                ("sums float32", lambda: ops.reduce_scatter(x > 0, group)),
                ("must be float32", lambda: ops.argmax(x.int(), 0, group)),
                ("must be float32", lambda: norm(x.int(), x.int(), torch.ones(6).int())),
                (r"must be \[rows, columns\]", lambda: ops.argmax(x[0], 0, group)),
                ("at least 1", lambda: ops.topk(x, 0, 0, group)),
                ("the residual's must be", lambda: norm(x, x[:2], torch.ones(6))),
                ("the residual's must be", lambda: norm(x, x, torch.ones(4))),
                ("must be the same", lambda: norm(x, x.half(), torch.ones(6))),
                ("fewer columns in all", lambda: ops.topk(x, 13, 6 * rank, group)),
                ("999", lambda: yoke.all_reduce(x, 999)),
                ("was not built", lambda: yoke.shm_set_simd(handle, "none")),
            ]

            def norm(x: Tensor, residual: Tensor, weight: Tensor) -> object:
                return ops.all_reduce_add_rms_norm(x, residual, weight, 1e-5, group)

            for message, call in wrong:
                with pytest.raises((RuntimeError, ValueError), match=message):
                    call()
                assert ops.all_reduce(torch.ones(1), group).item() == 2, message

    run_forked(size, body)


def instruction_sets() -> None:
    """Every one that this machine has gives the same bits."""
    size, session = 2, new_session()

    def body(rank: int, tell: Tell) -> list[str]:
        found = []
        with shm_group(rank, size, session) as group:
            results: list[list[Tensor]] = []
            for name in ("base", "avx2", "avx512", "avx512bf16"):
                with contextlib.suppress(ValueError):
                    torch.ops.yoke.shm_set_simd(group.handle, name)
                    found.append(name)
                    s = Session(rank, size, random.Random(7))
                    of_this = [ops.all_reduce(s.numbers((1003,), d)[rank], group) for d in SUMMABLE]
                    results.append(of_this)
            for of_one in results:
                assert all(same(a, b) for a, b in zip(of_one, results[0], strict=True))
            assert found[-1] == torch.ops.yoke.shm_simd()
        return found

    print("instruction sets:", ", ".join(run_forked(size, body)[0]))


def latency() -> None:
    """Four ranks, on as few cores as this machine has: ranks that wait must let the others run."""
    size, session = 4, new_session()

    def body(rank: int, tell: Tell) -> float:
        torch.set_num_threads(1)
        x = torch.ones(2048)  # 8 KiB
        with shm_group(rank, size, session) as group:
            for _ in range(20):
                ops.all_reduce(x, group)
            start = time.perf_counter()
            for _ in range(200):
                ops.all_reduce(x, group)
            return (time.perf_counter() - start) / 200

    mean = max(run_forked(size, body))
    print(f"8 KiB between 4 ranks: {mean * 1e6:.0f} us")
    assert mean < 20e-3, f"{mean * 1e3:.1f} ms: the ranks wait for the scheduler"


CASES = {
    case.__name__: case
    for case in (worlds, crowd, large_messages, threads, refusals, instruction_sets, latency)
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
