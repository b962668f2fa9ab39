"""How close are linears to the limits of memory and arithmetic? `python bench/linear.py`

Linears of 1, 4, 16 and 512 rows with weights of every form that files have. Each call uses another copy
of the weight, of so many that no cache holds them, in huge pages as in ranks. Measured for each linear:
the weight's bytes per second against the fastest bare read of the same round, floating-point operations
(two per weight and row) against the core's peak, and speed against packed bfloat16 with as many rows.
Linears, reads and peak alternate; ratios are within one round. Prints best and median; the last line is
JSON.

The bare read is tried with several numbers of streams and distances of prefetching, and the fastest
counts: one sequential stream reaches much less of the memory's bandwidth.

`--forms` selects some. On a busy machine, use small weights (`--shape 512 4096`): such a sample ends
before the scheduler runs another process.

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
from weights.quant import Factors, QuantWeight  # noqa: E402
from weights.schemes import GGUF_SCHEMES, NVFP4, Scheme, fp8_scheme  # noqa: E402

BF16, PACKED = "bf16", "bf16 packed"
FORMS: dict[str, Scheme] = {
    "int8": Scheme(8, 0), "int4-g128": Scheme(4, 128), "fp8": fp8_scheme(0),
    "fp8-g128": fp8_scheme(128), "NVFP4": NVFP4,
    **{label: GGUF_SCHEMES[label] for label in (
        "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q5_1", "Q4_K", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "MXFP4",
        "Q3_K", "Q2_K",
    )},
}  # fmt: skip
READS = ((4, 2048), (4, 4096), (6, 3072), (8, 2048), (12, 2048))  # streams, bytes of prefetching ahead
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


def make(form: str, n: int, k: int, total: int) -> Weights:
    ops = torch.ops.yoke_kernels
    if form == BF16:
        weight = torch.randn(n, k).bfloat16()
        copies = [weight.clone() for _ in range(-(-total // weight.nbytes))]
        return Weights([lambda x, w=w: ops.linear(x, w, None) for w in copies], weight.nbytes)  # type: ignore[misc]
    packed = pack_bf16(torch.randn(n, k).bfloat16()) if form == PACKED else _random(FORMS[form], n, k)
    numbers = packed.numbers
    copies = [packed.data.clone() for _ in range(-(-total // packed.nbytes))]
    return Weights(
        [lambda x, w=w: ops.quant_linear(x, w, numbers, None) for w in copies],  # type: ignore[misc]
        packed.nbytes,
    )


def _random(scheme: Scheme, n: int, k: int) -> Packed:
    """A packed weight with random codes. Factors are around 1, so that no sum is infinite."""
    codes = scheme.code_name
    data = torch.randint(0, 1 << scheme.bits, (n, k)).to(torch.uint8)
    if codes == "e4m3":
        data &= 0xBF

    def factors(kind: str, size: int) -> Factors:
        size = size or k
        shape = (n, -(-k // size))
        if kind in ("f16", "f32"):
            scale = torch.rand(shape).to(torch.float16 if kind == "f16" else torch.float32)
        else:
            base = {"e8m0": 127, "e4m3": 56}.get(kind, 1)
            scale = torch.randint(base, base + 8, shape).to(torch.int8 if kind == "i8" else torch.uint8)
        return Factors(size, scale, None if scheme.symmetric else scale.clone(), kind)

    supers = factors(scheme.super_scales, scheme.super_size) if scheme.super_scales else None
    own = factors(scheme.scale_kind, scheme.group_size)
    return pack(QuantWeight(data.view(torch.int8) if codes == "i8" else data, codes, own, supers))


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The samples: seconds by form and rows; bytes per second of a bare read and operations per
    second of the peak, by round."""
    n, k = flags.shape
    forms = [BF16, PACKED, *flags.forms]
    weights = {form: make(form, n, k, flags.mib << 20) for form in forms}
    cycles = {form: cycle(each.linears) for form, each in weights.items()}
    read_from = torch.randn(max(flags.mib << 20, FEW * flags.read_mib << 20) // 4)
    pieces = cycle(read_from.split(flags.read_mib << 18))
    rows = {m: torch.randn(m, k).bfloat16() for m in flags.rows}
    seconds: dict[str, dict[int, list[float]]] = {s: {m: [] for m in rows} for s in forms}
    reads, peaks = [], []
    rounds = 20_000
    torch.ops.yoke_kernels.peak(rounds)
    for _ in range(flags.samples):
        found = []
        for streams, ahead in READS:
            some = [next(pieces) for _ in range(FEW)]
            took = _timed(lambda: [torch.ops.yoke_kernels.read(x, streams, ahead) for x in some])  # noqa: B023
            found.append(sum(piece.nbytes for piece in some) / took)
        reads.append(max(found))
        start = time.perf_counter()
        done = torch.ops.yoke_kernels.peak(rounds)
        peaks.append(done / (time.perf_counter() - start))
        for form in forms:
            for m, x in rows.items():
                several = [next(cycles[form]) for _ in range(FEW if m <= FEW_ROWS else 1)]
                took = _timed(lambda: [linear(x) for linear in several])  # noqa: B023
                seconds[form][m].append(took / len(several))
    sizes = {form: each.nbytes for form, each in weights.items()}
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
    for form, by_rows in found["seconds"].items():
        for m, samples in by_rows.items():
            size, work, base = found["bytes"][form], 2.0 * m * n * k, found["seconds"][PACKED][m]
            lines.append(
                {
                    "form": form,
                    "rows": m,
                    "us": [1e6 * s for s in (min(samples), statistics.median(samples))],
                    "gb_per_s": [size / s / 1e9 for s in (min(samples), statistics.median(samples))],
                    "of_read": _ratios([size / s for s in samples], reads),
                    "gflop_per_s": [work / s / 1e9 for s in (min(samples), statistics.median(samples))],
                    "of_peak": _ratios([work / s for s in samples], peaks),
                    "over_packed": _ratios([1 / s for s in samples], [1 / s for s in base]),
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
    "over_packed": ("over packed bf16", 2),
}


def show(lines: Sequence[dict[str, Any]]) -> None:
    drawn = [["form", "rows", *(title for title, _ in _COLUMNS.values())]]
    for line in lines:
        cells = [
            " / ".join(f"{value:.{digits}f}" for value in line[name])
            for name, (_, digits) in _COLUMNS.items()
        ]
        drawn.append([line["form"], str(line["rows"]), *cells])
    table(drawn)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/linear.py", allow_abbrev=False)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 4, 16, 512], help="rows of x [1 4 16 512]"
    )
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], help="n and k of a weight")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mib", type=int, default=256, help="MiB of weights per form [256]")
    parser.add_argument("--read-mib", type=int, default=8, help="MiB of a bare read [8]")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM",
                        help=f"of {', '.join(FORMS)} [all]")  # fmt: skip
    flags = parser.parse_args(argv)
    for name in ("samples", "threads", "mib", "read_mib"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1")
    if min(*flags.rows, *flags.shape) < 1 or flags.shape[1] % 256:
        parser.error(
            f"--rows {flags.rows} --shape {flags.shape}: must be at least 1, and k a multiple of 256"
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
