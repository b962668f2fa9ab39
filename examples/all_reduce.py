"""A plain torch.distributed program that does not depend on Yoke.

    python launch.py run --bind-cores-to-rank examples/all_reduce.py --size 1048576

starts one process per socket, bound to that socket's cores and memory. This replaces
`deepspeed --bind_cores_to_rank` or a `numactl` line per process. `torchrun` can start it too.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser(description="Sum a vector over all ranks, and time it.")
    parser.add_argument("--size", type=int, default=1 << 20, help="number of elements of the vector")
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()

    dist.init_process_group("gloo")  # reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    rank, size = dist.get_rank(), dist.get_world_size()
    cpus = sorted(os.sched_getaffinity(0))
    print(
        f"rank {rank} of {size}: {torch.get_num_threads()} threads, main thread on cpus {cpus}",
        flush=True,
    )

    times = []
    for _ in range(options.repeat):
        vector = torch.full((options.size,), float(rank + 1))
        start = time.perf_counter()
        dist.all_reduce(vector)
        times.append(time.perf_counter() - start)
    expected = size * (size + 1) / 2
    assert bool((vector == expected).all()), f"the sum is {vector[0]}, not {expected}"
    if rank == 0:
        print(
            f"sum {expected:g} over {size} ranks, best of {options.repeat}: {min(times) * 1e3:.2f} ms"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
