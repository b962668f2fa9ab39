"""Many ranks, large messages, wrong arguments, every instruction set, few cores.

`python -m tests.child extremes CASE` forks the ranks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from comm import ops
from comm.sizes import slot_bytes
from comm.sources import read_level
from tests.targets.draws import SUMMABLE, Session, reference_sum, same
from tests.targets.forking import Report, new_session, run_forked, shm_group
from tests.targets.sequences import two_groups

INSTRUCTION_SETS = ("base", "avx2", "avx512", "avx512bf16")


def many_ranks() -> None:
    """64 ranks, tiny messages."""
    session, size = new_session(), 64

    def body(rank: int, report: Report) -> None:
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

    def body(rank: int, report: Report) -> None:
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


def refusals() -> None:
    """What cannot be is an error on every rank, before anybody waits, and the group goes on."""
    size, session = 2, new_session()

    def body(rank: int, report: Report) -> None:
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
                ("all ranks together have fewer", lambda: ops.topk(x, 13, 6 * rank, group)),
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

    def body(rank: int, report: Report) -> list[str]:
        found = []
        with shm_group(rank, size, session) as group:
            results: list[list[Tensor]] = []
            for level, name in enumerate(INSTRUCTION_SETS):
                if level > read_level():
                    with pytest.raises(ValueError, match=f"{name} was not built or does not run here"):
                        torch.ops.yoke.shm_set_simd(group.handle, name)
                    continue
                torch.ops.yoke.shm_set_simd(group.handle, name)
                found.append(name)
                s = Session(rank, size, random.Random(7))
                of_this = [ops.all_reduce(s.numbers((1003,), d)[rank], group) for d in SUMMABLE]
                results.append(of_this)
            for of_one in results:
                assert all(same(a, b) for a, b in zip(of_one, results[0], strict=True))
            assert found[-1] == torch.ops.yoke.shm_simd()
        return found

    print(*run_forked(size, body)[0])


def latency() -> None:
    """Four ranks, on as few cores as this machine has: ranks that wait must let the others run."""
    size, session = 4, new_session()

    def body(rank: int, report: Report) -> float:
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
    case.__name__: case for case in (many_ranks, large_messages, refusals, instruction_sets, latency)
}
