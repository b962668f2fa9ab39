"""What fraction of the cores' peak does a prefill reach? `python bench/prefill.py [--ranks 1 2]`

Random weights in the shape of a preset, bfloat16, batch of one, a prompt in one call of the engine's
compiled step. The bound is the arithmetic peak of all ranks' cores: a loop of tile matmuls from the L1
cache (without matrix units, of float32 vector operations), measured in the same ranks; samples of both
alternate. Operations of the model: two per token and weight of each matmul (the head for one token),
and those of attention. Operations done are fewer, since for tokens without logits the last layer
computes only keys and values. Prints best and median; with `--profile` also where rank 0 spends its
time (its samples are slower, because the compiled kernels are recorded). The last line is JSON.

What is not here: other programs on the same weights; decoding (bench/decode.py); batches.
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

from launcher.machine.topology import read_topology
from launcher.plan import LaunchRequest, plan_launch
from launcher.spawn import RunOptions, launch, new_session


def measure(task: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Run the ranks and return their samples: seconds per prompt, and peak operations per second."""
    plan = plan_launch(read_topology(), LaunchRequest(ranks=ranks, bind_cores=True))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        payload = json.dumps({**task, "out": str(out)})
        code = launch(plan, RunOptions(), new_session(), "bench.prefill_rank", payload)
        if code:
            sys.exit(code)
        return dict(json.loads(out.read_text()), ranks=ranks)


def line(found: dict[str, Any]) -> str:
    seconds, peaks, work = found["prompt_s"], found["peak_per_s"], found["operations"]
    bests, medians = (
        1 / min(seconds) / max(peaks),
        statistics.median(1 / s / p for s, p in zip(seconds, peaks, strict=True)),
    )
    best, median = min(seconds), statistics.median(seconds)
    return (
        f"{found['ranks']:>5}  {best * 1e3:8.1f} {median * 1e3:8.1f} ms  "
        f"{work / best / 1e9:7.0f} {work / median / 1e9:7.0f} GF/s  "
        f"{max(peaks) / 1e9:7.0f} {statistics.median(peaks) / 1e9:7.0f} GF/s  "
        + "  ".join(f"{each * bests:5.2f} {each * medians:5.2f}" for each in (work, found["done"]))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b", help="a preset")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512, help="length of the prompt in tokens")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--profile", action="store_true", help="show where rank 0 spends its time")
    options = parser.parse_args()
    task = {key: getattr(options, key) for key in ("model", "samples", "prompt", "eager", "profile")}
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.model}")
    print(
        "ranks  prompt: best, median    all ranks: best, median   peak: best, median      "
        "model / peak  done / peak"
    )
    results = []
    for ranks in options.ranks:
        results.append(measure(task, ranks))
        print(line(results[-1]), flush=True)
        for name, seconds in (results[-1]["parts"] or {}).items():
            if seconds > 1e-3:
                print(f"{seconds * 1e3:14.1f} ms  {name}")
    print(json.dumps({"task": task, "results": results}))


if __name__ == "__main__":
    main()
