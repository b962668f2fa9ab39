"""How near is a token to reading the weights? `python bench/decode.py [--model NAME] [--ranks 1 2]`

Random weights in the shape of a preset, bfloat16, batch of one, through the engine's own loop: the time
of a token is all of it (the compiled step, choosing the token, telling the other ranks). The bound is
the time to read a rank's weights once, measured in the same ranks at the same time, a sample of each in
turn, by the fastest read we know (eight streams). Best and median; the last line is JSON.

What is not here: other programs on the same weights; prefill; batches.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.plan import LaunchRequest, make_plan
from launcher.spawn import RunOptions, launch, new_session
from launcher.topology import read_topology


def measure(task: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What the ranks wrote: samples of token and read times, and bytes."""
    plan = make_plan(read_topology(), LaunchRequest(ranks=ranks, bind_cores=True))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        payload = json.dumps({**task, "out": str(out)})
        code = launch(plan, RunOptions(), new_session(), "bench.decode_rank", payload)
        if code:
            sys.exit(code)
        return dict(json.loads(out.read_text()), ranks=ranks)


def line(found: dict[str, Any]) -> str:
    token, read, size = found["token_s"], found["read_s"], found["weight_bytes"]
    fractions = [b / a for a, b in zip(token, read, strict=True)]
    best, median = min(token), statistics.median(token)
    return (
        f"{found['ranks']:>5}  {best * 1e3:8.2f} {median * 1e3:8.2f} ms  "
        f"{size / best / 1e9:6.2f} {size / median / 1e9:6.2f} GB/s  "
        f"{size / min(read) / 1e9:6.2f} {size / statistics.median(read) / 1e9:6.2f} GB/s  "
        f"{min(read) / best:5.2f} {statistics.median(fractions):5.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b", help="a preset")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16, help="a sample is the mean of so many tokens")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in use before the first")
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()
    task = {key: getattr(options, key) for key in ("model", "samples", "tokens", "prompt", "eager")}
    task["max_seq_len"] = options.max_seq_len
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.model}")
    print("ranks  token: best, median    per rank: best, median   read: best, median      read / token")
    results = []
    for ranks in options.ranks:
        results.append(measure(task, ranks))
        print(line(results[-1]), flush=True)
    print(json.dumps({"task": task, "results": results}))


if __name__ == "__main__":
    main()
