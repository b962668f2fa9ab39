"""How close are linears to the limits of memory and arithmetic? `python bench/linear.py`

Linears of 1, 4, 16 and 512 rows with weights of bfloat16, int8, and int4 in groups of 32 and 128. Each
call uses another copy of the weight, of so many that no cache holds them, in huge pages as in ranks.
Measured for each linear: the weight's bytes per second against a bare read, floating-point operations
(two per weight and row) against the core's peak, and speed against the bfloat16 linear with as many
rows. Linears, read and peak alternate; ratios are within one round. Prints best and median; the last
line is JSON.

`--packed` adds bfloat16 in the packed layout of the quantized weights. On a busy machine, use small
weights (`--shape 512 4096`): such a sample ends before the scheduler runs another process.

What is not here: whole models (bench/decode.py, bench/prefill.py); the quality of quantized weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launcher.allocator import allocator_variables  # noqa: E402

if __name__ == "__main__" and "YOKE_BENCH" not in os.environ:
    # The C library reads the variables of its allocator only when a process starts.
    environment = {**os.environ, **allocator_variables(os.environ), "YOKE_BENCH": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)

import torch  # noqa: E402

from bench.allreduce import cpu_name, table  # noqa: E402
from kernels.load import load_kernels  # noqa: E402
from kernels.packed import pack_bf16  # noqa: E402
from kernels.quant_linear import Packed, pack  # noqa: E402
from weights.quant import QuantWeight  # noqa: E402
from weights.schemes import parse_scheme  # noqa: E402

SCHEMES = ("bf16", "int8", "int4-g32", "int4-g128")
BF16, PACKED = "bf16", "bf16 packed"
Linear = Callable[[torch.Tensor], object]


# Linears of up to FEW_ROWS rows run FEW times in a row, each with another weight, as in a decode step.
# A single one would be measured at the clock of the loop before it (that of the tiles is lower).
FEW, FEW_ROWS = 8, 16


@dataclass(frozen=True)
class Weights:
    """Copies of one weight, too many for any cache, each as a function that multiplies by it; `nbytes`
    is the size of one copy."""

    linears: list[Linear]
    nbytes: int


def make(scheme: str, n: int, k: int, total: int) -> Weights:
    ops = torch.ops.yoke_kernels
    if scheme == BF16:
        weight = torch.randn(n, k).bfloat16()
        copies = [weight.clone() for _ in range(-(-total // weight.nbytes))]
        return Weights([lambda x, w=w: ops.linear(x, w, None) for w in copies], weight.nbytes)  # type: ignore[misc]
    packed = pack_bf16(torch.randn(n, k).bfloat16()) if scheme == PACKED else _quantized(scheme, n, k)
    scale = packed.scale
    nbytes = packed.data.nbytes + (0 if scale is None else scale.nbytes)
    all_packed = [
        packed._replace(data=packed.data.clone(), scale=None if scale is None else scale.clone())
        for _ in range(-(-total // nbytes))
    ]
    return Weights([lambda x, w=w: ops.quant_linear(x, *w, None) for w in all_packed], nbytes)  # type: ignore[misc]


def _quantized(scheme: str, n: int, k: int) -> Packed:
    what = parse_scheme(scheme)
    group = what.group_size or k
    data = torch.randint(0, 256, (n, k * what.bits // 8), dtype=torch.uint8)
    scale = torch.rand(n, k // group).to(torch.float32 if group == k else torch.float16)
    return pack(
        QuantWeight(data.view(torch.int8) if what.bits == 8 else data, scale, None, what.bits, group)
    )


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The samples: seconds by scheme and rows; bytes per second of a bare read and operations per
    second of the peak, by round."""
    n, k = flags.shape
    schemes = [*SCHEMES, *([PACKED] if flags.packed else [])]
    weights = {scheme: make(scheme, n, k, flags.mib << 20) for scheme in schemes}
    cycles = {scheme: cycle(each.linears) for scheme, each in weights.items()}
    read_from = torch.randn(max(flags.mib << 20, 8 << 20) // 4)
    pieces = cycle(read_from.split(flags.read_mib << 18))
    rows = {m: torch.randn(m, k).bfloat16() for m in flags.rows}
    seconds: dict[str, dict[int, list[float]]] = {s: {m: [] for m in rows} for s in schemes}
    reads, peaks = [], []
    rounds = 20_000
    torch.ops.yoke_kernels.peak(rounds)
    for _ in range(flags.samples):
        some = [next(pieces) for _ in range(FEW)]
        took = _timed(lambda: [torch.ops.yoke_kernels.read(piece) for piece in some])  # noqa: B023
        reads.append(sum(piece.nbytes for piece in some) / took)
        start = time.perf_counter()
        done = torch.ops.yoke_kernels.peak(rounds)
        peaks.append(done / (time.perf_counter() - start))
        for scheme in schemes:
            for m, x in rows.items():
                several = [next(cycles[scheme]) for _ in range(FEW if m <= FEW_ROWS else 1)]
                took = _timed(lambda: [linear(x) for linear in several])  # noqa: B023
                seconds[scheme][m].append(took / len(several))
    sizes = {scheme: each.nbytes for scheme, each in weights.items()}
    return {"seconds": seconds, "bytes": sizes, "read_per_s": reads, "peak_per_s": peaks}


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def summary(found: dict[str, Any], n: int, k: int) -> list[dict[str, Any]]:
    """A line per linear, with values as [best, median]. A ratio is [ratio of the bests, median of the
    ratios of each round]."""
    reads, peaks = found["read_per_s"], found["peak_per_s"]
    lines = []
    for scheme, by_rows in found["seconds"].items():
        for m, samples in by_rows.items():
            size, work, base = found["bytes"][scheme], 2.0 * m * n * k, found["seconds"][BF16][m]
            lines.append(
                {
                    "scheme": scheme,
                    "rows": m,
                    "us": [1e6 * s for s in (min(samples), statistics.median(samples))],
                    "gb_per_s": [size / s / 1e9 for s in (min(samples), statistics.median(samples))],
                    "of_read": _ratios([size / s for s in samples], reads),
                    "gflop_per_s": [work / s / 1e9 for s in (min(samples), statistics.median(samples))],
                    "of_peak": _ratios([work / s for s in samples], peaks),
                    "over_bf16": _ratios([1 / s for s in samples], [1 / s for s in base]),
                }
            )
    return lines


def _ratios(own: Sequence[float], others: Sequence[float]) -> list[float]:
    return [
        max(own) / max(others),
        statistics.median(a / b for a, b in zip(own, others, strict=True)),
    ]


_COLUMNS = {
    "us": ("us", 0),
    "gb_per_s": ("GB/s", 1),
    "of_read": ("of read", 2),
    "gflop_per_s": ("GFLOP/s", 0),
    "of_peak": ("of peak", 2),
    "over_bf16": ("over bf16", 2),
}


def show(lines: Sequence[dict[str, Any]]) -> None:
    drawn = [["scheme", "rows", *(title for title, _ in _COLUMNS.values())]]
    for line in lines:
        cells = [
            " / ".join(f"{value:.{digits}f}" for value in line[name])
            for name, (_, digits) in _COLUMNS.items()
        ]
        drawn.append([line["scheme"], str(line["rows"]), *cells])
    table(drawn)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/linear.py", allow_abbrev=False)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 4, 16, 512], help="rows of x [1 4 16 512]"
    )
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], help="n and k of a weight")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mib", type=int, default=1024, help="MiB of weights per scheme [1024]")
    parser.add_argument("--read-mib", type=int, default=8, help="MiB of a bare read [8]")
    parser.add_argument("--packed", action="store_true", help="also bf16 in the packed layout")
    flags = parser.parse_args(argv)
    for name in ("samples", "threads", "mib", "read_mib"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1")
    if min(*flags.rows, *flags.shape) < 1 or flags.shape[1] % 128:
        parser.error(
            f"--rows {flags.rows} --shape {flags.shape}: must be at least 1, and k a multiple of 128"
        )
    return flags


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    if not load_kernels():
        sys.exit("bench/linear.py: nothing can be measured without a C++ compiler: install one")
    torch.set_num_threads(flags.threads)
    load = round(os.getloadavg()[0], 2)  # of other processes, before this benchmark starts
    found = measure(flags)
    lines = summary(found, *flags.shape)
    reads, peaks = found["read_per_s"], found["peak_per_s"]
    print(f"{cpu_name()}, torch {torch.__version__}, load {load}, {flags.shape}, best / median")
    show(lines)
    print(
        f"bare read {max(reads) / 1e9:.1f} / {statistics.median(reads) / 1e9:.1f} GB/s, "
        f"peak {max(peaks) / 1e9:.0f} / {statistics.median(peaks) / 1e9:.0f} GFLOP/s"
    )
    report = {"hardware": cpu_name(), "load": load, **vars(flags), "lines": lines, **found}
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
