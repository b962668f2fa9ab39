"""The part of bench/allreduce.py that runs in every rank: samples of all contenders, alternating.

A sample is a barrier and then a number of calls, timed together; the slowest rank's time counts.
Samples of all contenders are interleaved (A B C A B C), so that other load on the machine affects all
of them. Each is called in its fastest form, into existing memory:

    shm         comm.ops.all_reduce(x, group, out=out), the torch operator through its wrapper
    shm new     comm.ops.all_reduce(x, group), which returns a new tensor, as in a compiled graph
    gloo        torch.distributed.all_reduce(x), in place
    deepspeed   torch.ops.deepspeed.inference_all_reduce_(x), in place
    oneccl      oneCCL's C++ call through ctypes, without torch
    copy        not a collective: the faster of memmove and torch's copy_, of the message's size, in all
                ranks at once, for the bound

What is not here: tests of the results (tests/comm); only one sum of each contender is checked.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from base.rank_settings import RankSettings
from comm import ops
from comm.group import Group, GroupOptions, Rendezvous, open_group

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_CALLS = 1000
EPS = 1e-5
Call = Callable[[], object]
AllReduce = Callable[[Tensor, Tensor], object]  # (x, out): the sum is in `out`, or in x if in place


def main(env: RankSettings, payload: str) -> int:
    """Measure as the payload says; rank 0 writes the result as JSON into the payload's file."""
    task = json.loads(payload)
    torch.set_num_threads(env.plan.num_threads)
    rendezvous = Rendezvous(env.session, env.master_addr, env.master_port, env.store_fd)
    with ExitStack() as stack, torch.inference_mode():

        def opened(backend: str) -> Group:
            group = stack.enter_context(
                open_group(env.rank, env.world_size, backend, rendezvous, 600.0, GroupOptions("bench"))
            )
            if group.backend != backend:
                raise RuntimeError(f"the backend {backend} is not available here")
            return group

        gloo, shm = opened("gloo"), opened("shm")
        contenders: dict[str, AllReduce] = {
            "shm": lambda x, out: ops.all_reduce(x, shm, out=out),
            "shm new": lambda x, out: out.copy_(ops.all_reduce(x, shm)),
            "gloo": lambda x, out: dist.all_reduce(x),
        }
        if "deepspeed" in task["transports"]:
            opened("deepspeed")
            contenders["deepspeed"] = lambda x, out: torch.ops.deepspeed.inference_all_reduce_(x)
        if "oneccl" in task["transports"]:
            contenders["oneccl"] = open_oneccl(task["oneccl"], env.rank, env.world_size)
        for name, all_reduce in contenders.items():
            check(name, all_reduce, gloo)
        # Measured without the copy, which only the check needs.
        contenders["shm new"] = lambda x, out: ops.all_reduce(x, shm)
        result = {
            "all_reduce": [
                compare(dtype, size, contenders, task, shm)
                for dtype in task["dtypes"]
                for size in task["sizes"]
            ],
            "fused": [compare_fused(shape, task, shm) for shape in task["shapes"]],
        }
    if env.rank == 0:
        Path(task["result"]).write_text(json.dumps(result))
    return 0


def check(name: str, all_reduce: AllReduce, group: Group) -> None:
    """Raise RuntimeError if a sum is wrong: the speed of wrong sums means nothing."""
    for dtype in DTYPES.values():
        x = torch.full((4099,), float(group.rank + 1), dtype=dtype)
        out = torch.zeros_like(x)
        all_reduce(x, out)
        wanted = torch.full_like(x, group.size * (group.size + 1) / 2)
        if not (torch.equal(x, wanted) or torch.equal(out, wanted)):
            raise RuntimeError(f"{name} computes a wrong sum of {dtype}")


def compare(
    dtype: str, size: int, contenders: dict[str, AllReduce], task: dict[str, Any], group: Group
) -> dict[str, Any]:
    """All contenders with messages of `size` bytes: {dtype, bytes, seconds: {name: [sample]}}."""
    # Zeros, because repeated in-place sums leave them unchanged.
    x = torch.zeros(size // DTYPES[dtype].itemsize, dtype=DTYPES[dtype])
    out = torch.ones_like(x)
    calls: dict[str, Call] = {
        name: (lambda f=f: f(x, out))  # type: ignore[misc]
        for name, f in contenders.items()
    }
    source, target = out.data_ptr(), torch.ones_like(x)
    calls["memmove"] = lambda: ctypes.memmove(target.data_ptr(), source, size)
    calls["copy_"] = lambda: target.copy_(out)
    seconds = measure(calls, task, group)
    fastest = min(("memmove", "copy_"), key=lambda name: min(seconds[name]))
    seconds["copy"] = seconds[fastest]
    del seconds["memmove"], seconds["copy_"]
    return {"dtype": dtype, "bytes": size, "seconds": seconds}


def compare_fused(shape: list[int], task: dict[str, Any], group: Group) -> dict[str, Any]:
    """All-reduce, addition to the residual and norm, in one operator and in several: {shape,
    seconds}."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    weight = torch.ones(shape[-1], dtype=torch.bfloat16)

    def separate(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + ops.all_reduce(x, group)
        full = total.float()
        scale = torch.rsqrt(full.square().mean(-1, keepdim=True) + EPS)
        return (full * scale).to(x.dtype) * weight, total

    torch.compiler.reset()
    compiled = torch.compile(separate, fullgraph=True, dynamic=False)
    calls: dict[str, Call] = {
        "fused": lambda: ops.all_reduce_add_rms_norm(x, residual, weight, EPS, group),
        "compiled": lambda: compiled(x, residual, weight),
        "eager": lambda: separate(x, residual, weight),
    }
    return {"shape": shape, "seconds": measure(calls, task, group)}


def measure(calls: dict[str, Call], task: dict[str, Any], group: Group) -> dict[str, list[float]]:
    """Seconds per call of each contender, for each sample, on the slowest rank."""
    counts = {}
    for name, call in calls.items():
        call()
        ops.barrier(group)
        call()  # again: the first call may have compiled, or touched new memory
        estimate = timed(call, 3, group)
        wanted = int(task["sample_s"] / max(estimate, 1e-9))
        # All ranks must call equally often: rank 0 decides.
        counts[name] = int(ops.broadcast(torch.tensor([max(1, min(MAX_CALLS, wanted))]), 0, group))
    own = torch.tensor(
        [
            [timed(call, counts[name], group) for name, call in calls.items()]
            for _ in range(task["samples"])
        ],
        dtype=torch.float64,
    )
    slowest = ops.all_gather(own, group).amax(0)
    return {name: slowest[:, i].tolist() for i, name in enumerate(calls)}


def timed(call: Call, count: int, group: Group) -> float:
    ops.barrier(group)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def open_oneccl(library: str, rank: int, size: int) -> AllReduce:
    """oneCCL between the ranks, over its shared memory, without its own thread: if a rank has no second
    core for that thread, oneCCL is a thousand times slower."""
    os.environ.update(
        CCL_PROCESS_LAUNCHER="none",
        CCL_LOCAL_SIZE=str(size),
        CCL_LOCAL_RANK=str(rank),
        CCL_ATL_TRANSPORT="ofi",
        CCL_ATL_SHM="1",
        CCL_WORKER_OFFLOAD="0",
        CCL_LOG_LEVEL="error",
    )
    ccl = ctypes.CDLL(library)
    ccl.bench_ccl_failure.restype = ctypes.c_char_p
    ccl.bench_ccl_address_bytes.restype = ctypes.c_size_t
    address = torch.zeros(ccl.bench_ccl_address_bytes(), dtype=torch.uint8)

    def checked(code: int) -> None:
        if code:
            raise RuntimeError(ccl.bench_ccl_failure().decode())

    if rank == 0:
        checked(ccl.bench_ccl_address(ctypes.c_void_p(address.data_ptr())))
    dist.broadcast(address, 0)
    checked(ccl.bench_ccl_open(rank, size, ctypes.c_void_p(address.data_ptr())))
    call = ccl.bench_ccl_all_reduce
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def all_reduce(x: Tensor, out: Tensor) -> None:
        checked(call(x.data_ptr(), out.data_ptr(), x.numel(), x.dtype == torch.bfloat16))

    return all_reduce
