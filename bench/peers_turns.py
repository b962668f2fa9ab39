"""The launcher's console in bench/peers.py: it alternates samples of Yoke's rank 0 and of llama.cpp.

It is called with the path of the task's description; the launcher adds the descriptor of the channel
and its process id. It writes the result into the file that the task names.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import IO, Any

KEYS = ("ttft_s", "tpot_s")
KEPT = (
    *KEYS,
    "idle_cpu_s",
)  # cpu time since its last sample, almost nothing
PAUSE_S = 0.05  # after this, the threads of the previous contender sleep
Sample = dict[str, Any]


def main(spec: str, descriptor: str) -> None:
    task = json.loads(Path(spec).read_text())
    channel = socket.socket(fileno=int(descriptor)).makefile("rw", encoding="utf-8")
    opened = read(channel)
    contenders = task["contenders"]
    variants = {name: one for group in contenders.values() for name, one in group.items()}
    with start_worker(task) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        given = {key: task[key] for key in ("threads", "max_seq_len", "tokens")}
        write(worker.stdin, json.dumps(given | {"variants": variants, "prompt": opened["prompt"]}))
        llama = read(worker.stdout)

        def yoke() -> Sample:
            write(channel, '{"sample": 1}')
            return read(channel)

        def other(name: str) -> Callable[[], Sample]:
            assert worker.stdin is not None and worker.stdout is not None
            asked, answered = worker.stdin, worker.stdout

            def ask() -> Sample:
                write(asked, name)
                return read(answered)

            return ask

        calls = {name: other(name) for name in variants}
        rounds(calls, 1)  # a warm-up
        rounds({"yoke": yoke}, 2)
        trial = rounds(calls, task["trial"])
        chosen = {name: fastest(trial, list(group)) for name, group in contenders.items()}
        kept = {variant for choice in chosen.values() for variant in choice.values()}
        samples = rounds({"yoke": yoke} | {name: calls[name] for name in sorted(kept)}, task["samples"])
        worker.stdin.close()
    result = {
        "yoke": opened["ready"],
        "llama": llama,
        "trial": {name: times(found) for name, found in trial.items()},
        "chosen": chosen,
        "same_tokens": {
            f"{first} and {second}": same(samples[first][-1]["tokens"], samples[second][-1]["tokens"])
            for first, second in combinations(samples, 2)
        },
        "seconds": {name: times(found) for name, found in samples.items()},
    }
    Path(task["result"]).write_text(json.dumps(result))


def start_worker(task: dict[str, Any]) -> subprocess.Popen[str]:
    """Start llama.cpp's worker, with each thread pinned to one of the cores of Yoke's ranks."""
    cpus = task["cpus"]
    places = ",".join(f"{{{cpu}}}" for cpu in cpus)
    pinned = {"OMP_PLACES": places, "OMP_PROC_BIND": "close"} if task["threads"] <= len(cpus) else {}
    os.sched_setaffinity(0, cpus)
    return subprocess.Popen(
        [task["python"], task["worker"]],
        env={**os.environ, **pinned},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def write(stream: IO[str], line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


def read(stream: IO[str]) -> Sample:
    line = stream.readline()
    if not line:
        sys.exit("bench/peers.py: Yoke's rank 0 or llama.cpp's worker has exited; see its messages")
    return dict(json.loads(line))


def rounds(calls: dict[str, Callable[[], Sample]], count: int) -> dict[str, list[Sample]]:
    """Take a sample of each contender, `count` times, starting with another contender each time."""
    found: dict[str, list[Sample]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(count):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            time.sleep(PAUSE_S)
            found[name].append(calls[name]())
        print(f"round {i + 1} of {count}, {len(names)} contenders", file=sys.stderr, flush=True)
    return found


def fastest(trial: dict[str, list[Sample]], names: list[str]) -> dict[str, str]:
    """{key of a time: the variant with the best such time}."""
    return {key: min(names, key=lambda name: min(one[key] for one in trial[name])) for key in KEYS}


def times(samples: list[Sample]) -> list[dict[str, float]]:
    return [{key: one[key] for key in KEPT} for one in samples]


def same(first: list[int], second: list[int]) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(first))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
