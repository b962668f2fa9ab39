"""How fast is an all-reduce, and how close to the memory bound? `python bench/allreduce.py`

Real ranks, bound, one core each if there are enough (--cores-per-rank). Each world size of --ranks is
one run, in which all contenders alternate: Yoke's operator over shared memory ("shm"; "shm new" returns
a new tensor), gloo, and, if they are installed, DeepSpeed's shared-memory operator and oneCCL. How each
is called: `bench/allreduce_rank.py`. Prints best and median of the samples, and the median of the
ratios of adjacent samples. The last line is JSON.

The bound, for messages of B bytes and N ranks. Each rank's bandwidth is measured: all ranks copy B
bytes at the same time, and a copy reads B and writes B. Two times follow from it:

    floor   2 B: with any algorithm, a rank must read its input and write its output.
    bound   reduce-scatter and all-gather through shared memory, counting all that a rank touches:
                reads   B            its input
                writes  B (N-1)/N    the parts that other ranks sum, into shared memory
                reads   B (N-1)/N    its own part, of N-1 peers
                writes  B / N        its sum, into shared memory
                reads   B (N-1)/N    the peers' sums
                writes  B            its output
            in total B (3 + 2 (N-1)/N): 4 B for two ranks, 4.5 B for four.

Shared memory that stays in caches is faster than that copy, so more than 100 % of the bound is
possible. The read for ownership that caches do on a write also occurs in the copy; it is counted in
neither.

Also measured: the all-reduce fused with the residual and RMS norm that follow it in a model, against
separate operators, eager and compiled. Targets on two idle cores: 8 KiB in less than 5 us, 100 times
faster than gloo; 16 MiB at 60 % of the bound. On a busy machine, trust only the best. What is not here:
several machines; ranks on several sockets are measured only if the machine has them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[0] = str(CHECKOUT)

from launcher.doctor.backends import find_backends  # noqa: E402
from launcher.draw import plan_to_json  # noqa: E402
from launcher.machine.topology import Topology, format_cpu_list, read_topology  # noqa: E402
from launcher.plan import LaunchPlan, LaunchRequest, plan_launch  # noqa: E402
from launcher.spawn import RunOptions, launch, new_session  # noqa: E402

KIB = 1024
SIZES = [KIB, 4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB, 256 * KIB]
SIZES += [KIB * KIB * mib for mib in (1, 4, 16, 64)]
SHAPES = [[1, 4096], [8, 4096], [128, 4096], [2048, 4096]]
BOUND_FROM = 1024 * KIB  # below, latency dominates, and a share of the bandwidth means nothing


@dataclass(frozen=True)
class World:
    """The plan and the results of one world size."""

    plan: LaunchPlan
    all_reduce: list[dict[str, Any]]
    fused: list[dict[str, Any]]


def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    topology = read_topology()
    load = round(os.getloadavg()[0], 2)  # of other processes, before this benchmark starts
    with tempfile.TemporaryDirectory(prefix="yoke-bench-") as folder:
        transports, missing, library = find_transports(flags.only, Path(folder))
        task = {
            "sizes": flags.sizes,
            "dtypes": flags.dtypes,
            "shapes": [] if flags.no_fused else SHAPES,
            "samples": flags.samples,
            "sample_s": flags.sample_ms / 1000,
            "transports": transports,
            "oneccl": library,
            "result": str(Path(folder) / "result.json"),
        }
        worlds = []
        for ranks in flags.ranks:
            worlds.append(run(topology, ranks, flags.cores_per_rank, task))
    report = {
        "hardware": f"{cpu_name()}, {len(topology.cores)} cores",
        "versions": versions(),
        "load": load,
        "samples": flags.samples,
        "missing": missing,
        "worlds": [world_to_json(topology, world) for world in worlds],
    }
    show(report)
    if flags.plot is not None:
        plot(report, flags.plot)
    print(json.dumps(report))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/allreduce.py", allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes [2 4]")
    parser.add_argument("--cores-per-rank", type=int, default=1, help="0: all cores of its place [1]")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of a message")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--sample-ms", type=float, default=2.0, help="approximate length of a sample")
    parser.add_argument("--only", nargs="+", help="optional contenders: deepspeed, oneccl or none")
    parser.add_argument("--no-fused", action="store_true", help="leave out the fused operator")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="latency by size (matplotlib)")
    return parser.parse_args(argv)


def find_transports(
    only: Sequence[str] | None, folder: Path
) -> tuple[list[str], dict[str, str], str | None]:
    """The optional contenders that are available, the reasons why others are not, and the path of the
    library with oneCCL's."""
    found, missing, library = [], {}, None
    deepspeed = find_backends(metadata.version("torch"))[0]
    if only is not None and "deepspeed" not in only:
        missing["deepspeed"] = "not asked for"
    elif deepspeed.fits:
        found.append("deepspeed")
    else:
        missing["deepspeed"] = "not installed" if not deepspeed.found else deepspeed.note
    if only is not None and "oneccl" not in only:
        missing["oneccl"] = "not asked for"
    else:
        try:
            library = build_oneccl(folder)
            found.append("oneccl")
        except metadata.PackageNotFoundError:
            missing["oneccl"] = "not installed (pip install oneccl-devel)"
        except (OSError, subprocess.SubprocessError) as error:
            missing["oneccl"] = f"bench/oneccl.cpp does not compile: {error}"
    return found, missing, library


def build_oneccl(folder: Path) -> str:
    """Compile bench/oneccl.cpp against the packages oneccl and oneccl-devel; returns the library."""
    headers = [file for file in metadata.files("oneccl-devel") or [] if file.name == "ccl.hpp"]
    libraries = {Path(str(file.locate())).resolve() for file in metadata.files("oneccl") or []}
    # libccl.so.1 holds the interface and needs libccl.so.2.
    parts = [str(path) for n in (1, 2) for path in libraries if path.name == f"libccl.so.{n}"]
    if not headers or len(parts) != 2:
        raise OSError("the packages have no ccl.hpp or no libccl.so.1 and libccl.so.2")
    include = Path(str(headers[0].locate())).resolve().parent.parent
    built = folder / "liboneccl_bench.so"
    command = [
        *("g++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-isystem{include}"),
        *(str(CHECKOUT / "bench" / "oneccl.cpp"), "-o", str(built), "-Wl,--no-as-needed", *parts),
        f"-Wl,--disable-new-dtags,-rpath,{Path(parts[0]).parent}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return str(built)


def run(topology: Topology, ranks: int, cores_per_rank: int, task: dict[str, Any]) -> World:
    """Measure one world size in real ranks. Raises SystemExit with the launcher's exit code if that
    fails."""
    enough = len(topology.cores) >= ranks
    request = LaunchRequest(
        ranks=ranks, bind_cores=True, cores_per_rank=cores_per_rank or None if enough else None
    )
    plan = plan_launch(topology, request)
    print(f"measuring {ranks} ranks ...", file=sys.stderr)
    code = launch(plan, RunOptions(), new_session(), "bench.allreduce_rank", json.dumps(task))
    if code:
        raise SystemExit(code)
    result = json.loads(Path(task["result"]).read_text())
    return World(plan, result["all_reduce"], result["fused"])


def world_to_json(topology: Topology, world: World) -> dict[str, Any]:
    ranks = len(world.plan.ranks)
    return {
        "ranks": ranks,
        "shares_cores": len({cpu for rank in world.plan.ranks for cpu in rank.cpus}) < ranks,
        "plan": plan_to_json(topology, world.plan)["ranks"],
        "all_reduce": [_summary(one, ranks) for one in world.all_reduce],
        "fused": [
            {"shape": one["shape"], **_statistics(one["seconds"], "fused")} for one in world.fused
        ],
    }


def bound_bytes(size: int, ranks: int) -> float:
    """The bytes that a rank reads and writes; see the module's docstring."""
    return size * (3 + 2 * (ranks - 1) / ranks)


def _summary(one: dict[str, Any], ranks: int) -> dict[str, Any]:
    size, seconds = one["bytes"], dict(one["seconds"])
    copy_s = min(seconds.pop("copy"))
    bytes_per_s = 2 * size / copy_s
    floor_s, bound_s = copy_s, bound_bytes(size, ranks) / bytes_per_s
    best_s = min(seconds["shm"])
    return {
        "dtype": one["dtype"],
        "bytes": size,
        **_statistics(seconds, "shm"),
        "copy_gb_per_s": round(bytes_per_s / 1e9, 3),
        "floor_us": _us(floor_s),
        "bound_us": _us(bound_s),
        "of_floor": round(floor_s / best_s, 4),
        "of_bound": round(bound_s / best_s, 4),
        "gb_per_s": round(size / best_s / 1e9, 3),
    }


def _statistics(seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    """{times: {name: {best_us, median_us}}, ratios: {name: median of its samples / base's}}."""
    return {
        "times": {
            name: {"best_us": _us(min(samples)), "median_us": _us(statistics.median(samples))}
            for name, samples in seconds.items()
        },
        "ratios": {
            name: round(
                statistics.median(a / b for a, b in zip(samples, seconds[base], strict=True)), 3
            )
            for name, samples in seconds.items()
            if name != base
        },
    }


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    print(f"{report['hardware']}, load {report['load']}\n{report['versions']}")
    print(f"{report['samples']} samples of each, interleaved; best / median in us")
    for name, why in report["missing"].items():
        print(f"{name}: not measured: {why}")
    for world in report["worlds"]:
        places = ", ".join(f"{r['rank']} on cpus {format_cpu_list(r['cpus'])}" for r in world["plan"])
        shared = "; RANKS SHARE CORES: scheduling dominates latency" if world["shares_cores"] else ""
        print(f"\n{world['ranks']} ranks: {places}{shared}")
        for dtype in dict.fromkeys(one["dtype"] for one in world["all_reduce"]):
            rows = [one for one in world["all_reduce"] if one["dtype"] == dtype]
            names = list(rows[0]["times"])
            others = [name for name in names if name in rows[0]["ratios"] and name != "shm new"]
            header = [dtype, *names, *(f"{name}/shm" for name in others), "copy", "floor", "bound"]
            table([header, *(_row(one, names, others) for one in rows)])
        if world["fused"]:
            names = list(world["fused"][0]["times"])
            header = ["sum + add + norm", *names, *(f"{name}/fused" for name in names[1:])]
            rows = [
                [
                    "x".join(map(str, one["shape"])) + " bf16",
                    *(_pair(one["times"][name]) for name in names),
                    *(f"{one['ratios'][name]:.2f}" for name in names[1:]),
                ]
                for one in world["fused"]
            ]
            table([header, *rows])
    print("copy: GB/s per rank, reads and writes; floor, bound: the share that shm reaches")


def _row(one: dict[str, Any], names: list[str], others: list[str]) -> list[str]:
    large = one["bytes"] >= BOUND_FROM
    return [
        _size(one["bytes"]),
        *(_pair(one["times"][name]) for name in names),
        *(f"{one['ratios'][name]:.1f}" for name in others),
        f"{one['copy_gb_per_s']:.1f}" if large else "",
        f"{100 * one['of_floor']:.0f} %" if large else "",
        f"{100 * one['of_bound']:.0f} %" if large else "",
    ]


def _pair(times: dict[str, float]) -> str:
    return " / ".join(f"{v:.1f}" if v < 1000 else f"{v:.0f}" for v in times.values())


def _size(size: int) -> str:
    return f"{size // KIB} KiB" if size < KIB * KIB else f"{size // (KIB * KIB)} MiB"


def table(rows: list[list[str]]) -> None:
    """Print a table: with rich on a terminal, else in aligned columns. The first row is the header."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table()
        for i, name in enumerate(rows[0]):
            drawn.add_column(name, justify="right" if i else "left")
        for row in rows[1:]:
            drawn.add_row(*row)
        Console().print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def plot(report: dict[str, Any], path: Path) -> None:
    """Plot the best latency by size: one line per contender or bound, one panel per world, dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (world["ranks"], dtype, [one for one in world["all_reduce"] if one["dtype"] == dtype])
        for world in report["worlds"]
        for dtype in dict.fromkeys(one["dtype"] for one in world["all_reduce"])
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 5), squeeze=False)
    for axis, (ranks, dtype, rows) in zip(axes[0], panels, strict=True):
        sizes = [one["bytes"] for one in rows]
        for name in rows[0]["times"]:
            axis.loglog(sizes, [one["times"][name]["best_us"] for one in rows], "o-", label=name)
        axis.loglog(sizes, [one["bound_us"] for one in rows], "k:", label="bound")
        axis.set(title=f"all-reduce, {ranks} ranks, {dtype}", xlabel="bytes", ylabel="best, us")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend()
    figure.suptitle(report["hardware"], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def versions() -> str:
    named = [f"Python {platform.python_version()}", f"Linux {platform.release()}"]
    for name in ("torch", "deepspeed", "oneccl"):
        try:
            named.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(named)


def cpu_name() -> str:
    match = re.search(r"^model name\s*: *(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
