"""How much faster are quantized weights, in prefill and decode? `python bench/quant.py [--quant int8]`

The same model runs several times in the same ranks: in bfloat16, with each scheme, and with `--eager`
also in bfloat16 without compiling, with torch's own matmuls. Samples of decode steps and prefills of
all variants alternate, so that a ratio compares the same moment. Prints best and median; the last line
is JSON. A preset has random weights; a folder or .gguf has its own. A scheme may be followed by the
head's scheme, named as in quant_head=: int4-g32/same.

What is not here: single linears (bench/linear.py), the loss of quality (bench/quality.py), other
programs (bench/peers.py).
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
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from base.errors import InputError  # noqa: E402
from launcher.machine.topology import read_topology  # noqa: E402
from launcher.plan import LaunchRequest, plan_launch  # noqa: E402
from launcher.spawn import RunOptions, launch, new_session  # noqa: E402
from models.quant_rules import parse_asked  # noqa: E402

PLAIN, EAGER = "none", "eager"  # bfloat16, compiled and not
Found = dict[str, Any]


def measure(task: dict[str, Any], ranks: int, cores_per_rank: int | None) -> Found:
    """Run the ranks and return their result. Raises SystemExit with the launcher's exit code if it
    fails."""
    plan = plan_launch(
        read_topology(), LaunchRequest(ranks=ranks, bind_cores=True, cores_per_rank=cores_per_rank)
    )
    with tempfile.TemporaryDirectory(prefix="yoke-bench-") as folder:
        out = Path(folder) / "out.json"
        payload = json.dumps({**task, "out": str(out)})
        code = launch(plan, RunOptions(), new_session(), "bench.quant_rank", payload)
        if code:
            raise SystemExit(code)
        found: Found = json.loads(out.read_text())
    return found


def summary(found: Found) -> list[Found]:
    """A row per variant: seconds as [best, median], and the speedup over the first variant, as [ratio
    of the bests, median of the samples' ratios]."""
    rows = []
    first = found["variants"][0]
    for one in found["variants"]:
        row = {"name": one["name"], "weight_bytes": one["weight_bytes"]}
        for kind in ("token_s", "prompt_s"):
            ratios = [a / b for a, b in zip(first[kind], one[kind], strict=True)]
            row[kind] = [min(one[kind]), statistics.median(one[kind])]
            row[f"{kind}_times"] = [min(first[kind]) / min(one[kind]), statistics.median(ratios)]
        seconds = found["read_s_per_byte"]
        shares = [one["weight_bytes"] * r / t for r, t in zip(seconds, one["token_s"], strict=True)]
        best = one["weight_bytes"] * min(seconds) / min(one["token_s"])
        rows.append(row | {"of_read": [best, statistics.median(shares)]})
    return rows


def over_eager(found: Found) -> dict[str, list[float]]:
    """The speedup of each variant's decode steps over those without compiling, [best, median]."""
    *others, eager = found["variants"]
    times = {}
    for one in others:
        ratios = [a / b for a, b in zip(eager["token_s"], one["token_s"], strict=True)]
        times[one["name"]] = [min(eager["token_s"]) / min(one["token_s"]), statistics.median(ratios)]
    return times


def draw(rows: Sequence[Found], title: str) -> None:
    table = Table(title=title, title_justify="left")
    titles = ("ms/token", "tokens/s", "speedup", "GB/rank", "of bare read", "ms/prompt", "speedup")
    table.add_column("weights")
    for each in titles:
        table.add_column(each, justify="right")
    for row in rows:
        token, prompt = row["token_s"], row["prompt_s"]
        cells = (
            _pair([1e3 * s for s in token], 1), _pair([1 / s for s in token], 1),
            _pair(row["token_s_times"], 2), f"{row['weight_bytes'] / 1e9:.3f}",
            _pair(row["of_read"], 2), _pair([1e3 * s for s in prompt], 0),
            _pair(row["prompt_s_times"], 2),
        )  # fmt: skip
        table.add_row(row["name"], *cells)
    Console(width=120).print(table)


def _pair(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _variant(text: str) -> str:
    """The type of --quant: "auto", or a scheme that the loader can quantize to."""
    try:
        if text != "auto":
            parse_asked(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/quant.py", allow_abbrev=False)
    parser.add_argument("--model", default="llama-3.2-1b", help="a preset, a .gguf or a folder")
    parser.add_argument("--quant", nargs="+", default=["int8", "int4-g32"], type=_variant)
    parser.add_argument(
        "--eager", action="store_true", help="also measure torch's bfloat16, uncompiled"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cores-per-rank", type=int, default=1, help="0: all cores of its place [1]")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="steps per sample, which is their mean")
    parser.add_argument("--prompt", type=int, default=512)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    variants = [PLAIN, *flags.quant, *([EAGER] if flags.eager else [])]
    task = {name: getattr(flags, name) for name in ("model", "batch", "samples", "tokens", "prompt")}
    task["variants"] = variants
    found = measure(task, flags.ranks, flags.cores_per_rank or None)
    rows = summary(found)
    title = (
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {flags.model}, "
        f"{flags.ranks} ranks, batch of {flags.batch}, prompt of {flags.prompt}: best / median"
    )
    draw(rows, title)
    if flags.eager:
        for name, times in over_eager(found).items():
            print(f"{name}: {_pair(times, 2)} times the tokens/s of eager bfloat16")
    print(json.dumps({"task": task, "ranks": flags.ranks, "variants": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
