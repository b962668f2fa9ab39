"""How close is a decode step to reading the weights? `python bench/decode.py [--model M] [--ranks 1 2]`

The engine's own loop runs, so the time of a step is complete: the compiled step, choosing the token,
sending it to the other ranks. A preset has random weights; a folder or .gguf has its own. The bound is
the time to read a rank's weights once, measured in the same ranks with the fastest known read. Bare
reads and steps of each batch size alternate in one process, over the same weights, so the ratios of one
sample are of the same moment. World sizes are launched alternately, `--rounds` times. Prints best and
median; the last line is JSON.

`--profile` shows where the time of a step goes (bench/breakdown.py).

What is not here: other programs on the same weights; prefill.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from bench.breakdown import draw, overhead_us  # noqa: E402
from launcher.machine.topology import read_topology  # noqa: E402
from launcher.plan import LaunchRequest, plan_launch  # noqa: E402
from launcher.spawn import RunOptions, launch, new_session  # noqa: E402

Found = dict[str, Any]


def measure(task: dict[str, Any], ranks: int, cores_per_rank: int | None) -> Found:
    """Run the ranks and return their result. Raises SystemExit with the launcher's exit code if it
    fails."""
    request = LaunchRequest(ranks=ranks, bind_cores=True, cores_per_rank=cores_per_rank)
    plan = plan_launch(read_topology(), request)
    with tempfile.TemporaryDirectory(prefix="yoke-bench-") as folder:
        out = Path(folder) / "out.json"
        payload = json.dumps({**task, "out": str(out)})
        code = launch(plan, RunOptions(), new_session(), "bench.decode_rank", payload)
        if code:
            raise SystemExit(code)
        found: Found = json.loads(out.read_text())
    # The keys of a JSON object are strings.
    for name in ("token_s", "profiles"):
        found[name] = {int(batch): value for batch, value in found[name].items()}
    return found


def joined(rounds: Sequence[Found]) -> Found:
    """The samples of all rounds, concatenated; the profiles of the first round."""
    first = rounds[0]
    return first | {
        "read_s": [s for found in rounds for s in found["read_s"]],
        "token_s": {b: [s for found in rounds for s in found["token_s"][b]] for b in first["token_s"]},
    }


def summary(found: Found, ranks: int) -> Found:
    """The figures of one world size, as [best, median]. Ratios are [ratio of the bests, median of the
    ratios within a sample]."""
    size, read = found["weight_bytes"], found["read_s"]
    first = found["token_s"][min(found["token_s"])]
    base = min(found["token_s"])
    batches = []
    for batch, step in found["token_s"].items():
        speedups = [batch / base * a / b for a, b in zip(first, step, strict=True)]
        batches.append(
            {
                "batch": batch,
                "step_ms": [1e3 * s for s in _both(step)],
                "tokens_per_s": [batch / s for s in _both(step)],
                "gb_per_s": [size / s / 1e9 for s in _both(step)],
                "of_read": [min(read) / min(step), _median_ratio(read, step)],
                "over_first": [batch / base * min(first) / min(step), statistics.median(speedups)],
            }
        )
    return {
        "ranks": ranks,
        "weight_bytes": size,
        "read_gb_per_s": [size / s / 1e9 for s in _both(read)],
        "batches": batches,
        "profiles": found["profiles"],
    }


def scaling(worlds: Sequence[Found]) -> list[Found]:
    """The speedup of the other world sizes over the first, by bests and by medians."""
    return [
        {
            "batch": one["batch"],
            "ranks": [worlds[0]["ranks"], world["ranks"]],
            "speedup": [a / b for a, b in zip(base["step_ms"], one["step_ms"], strict=True)],
        }
        for world in worlds[1:]
        for base, one in zip(worlds[0]["batches"], world["batches"], strict=True)
    ]


def _both(samples: Sequence[float]) -> list[float]:
    return [min(samples), statistics.median(samples)]


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show(world: Found) -> None:
    for one in world["batches"]:
        cells = [_pair(one[name], digits) for name, digits in _COLUMNS]
        print(f"{world['ranks']:>5} {one['batch']:>6}" + "".join(f"{cell:>19}" for cell in cells))
    print(f"{'':12}bare read: {_pair(world['read_gb_per_s'], 2)} GB/s per rank", flush=True)


_COLUMNS = (("step_ms", 2), ("tokens_per_s", 1), ("gb_per_s", 2), ("of_read", 2), ("over_first", 2))
_TITLES = ("ms per step", "tokens/s", "GB/s per rank", "of bare read", "over first batch")


def _pair(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/decode.py", allow_abbrev=False)
    parser.add_argument("--model", default="llama-3.2-1b", help="a preset, a .gguf or a folder")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="world sizes [1 2]")
    parser.add_argument("--cores-per-rank", type=int, default=1, help="0: all cores of its place [1]")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences per step [1]")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--kv-dtype", choices=["bfloat16", "float32", "float16", "int8"])
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=1, help="launches of each world size [1]")
    parser.add_argument("--tokens", type=int, default=16, help="steps per sample, which is their mean")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the cache at the start")
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    names = ("model", "batch", "dtype", "kv_dtype", "samples", "tokens", "prompt", "max_seq_len")
    task = {name: getattr(flags, name) for name in (*names, "eager", "profile")}
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {flags.model}")
    print(f"best / median of {flags.samples * flags.rounds} samples")
    print("ranks  batch" + "".join(f"{title:>19}" for title in _TITLES))
    rounds: dict[int, list[Found]] = {ranks: [] for ranks in flags.ranks}
    for number in range(flags.rounds):
        for ranks, found in rounds.items():
            # The recorded code must be compiled separately: one profile is enough.
            once = task | {"profile": flags.profile and number == 0}
            found.append(measure(once, ranks, flags.cores_per_rank or None))
    worlds = [summary(joined(found), ranks) for ranks, found in rounds.items()]
    for world in worlds:
        show(world)
    gains = scaling(worlds)
    for gain in gains:
        before, after = gain["ranks"]
        print(f"batch {gain['batch']}: {after} ranks over {before}: {_pair(gain['speedup'], 2)} times")
    for world in worlds:
        for batch, profiles in world["profiles"].items():
            for one in profiles:
                one["overhead_us"] = overhead_us(one["parts"])
            draw(profiles, f"{world['ranks']} ranks, batch of {batch}")
    print(json.dumps({"task": task, "worlds": worlds, "scaling": gains}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
