"""Is Yoke faster than llama.cpp on the same file? `python bench/peers.py --python PATH [--model FILE]`

A GGUF file, a prompt, greedy tokens, a batch of one, the same cores: Yoke with bound ranks, llama.cpp
with as many threads pinned to the cores of those ranks. A sample is one request: the prompt from an
empty cache (time to the first token) and then `--tokens` tokens (mean time per token). Samples of all
contenders alternate in one run, and each round starts with another contender; a waiting contender does
not spin. A ratio is Yoke's speed over the other's in the same round.

llama.cpp runs the original file, and also the same weights in 16 bits, because Yoke holds them in 16
bits: then both read the same number of bytes. llama.cpp's options (flash attention or not; bfloat16 or
float16) are chosen in a trial of --trial samples each, separately for prompt and tokens. The 16-bit
files are written into a temporary folder.

llama-cpp-python must be installed in an environment of its own, which `--python` names:

    python -m venv /some/folder
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF
        -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON
        -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" /some/folder/bin/pip install llama-cpp-python

This builds without its AMX kernels, which crash with SIGILL on some virtual machines; enable only those
other extensions that the processor has. (If AMX works, leave out the flags: the build then detects the
processor.)

The launcher's console alternates the samples (`bench.peers_turns`); `bench.peers_rank` runs in Yoke's
ranks, `bench/peers_llama.py` in llama.cpp's environment. The last line is JSON. What is not here:
batches, other programs, the quality of the texts (only how many tokens agree).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[0] = str(CHECKOUT)

from base.errors import InputError  # noqa: E402
from bench.allreduce import cpu_name, table  # noqa: E402
from bench.peers_gguf import FILE_TYPES, write_dequantized  # noqa: E402
from engine.job import Job  # noqa: E402
from engine.resolve import resolve, to_json  # noqa: E402
from launcher.machine.topology import read_topology  # noqa: E402
from launcher.plan import LaunchRequest, plan_launch  # noqa: E402
from launcher.spawn import RunOptions, launch, new_session  # noqa: E402

YOKE = "yoke"
TASKS = {"prompt": "ttft_s", "tokens": "tpot_s"}


@dataclass(frozen=True)
class Row:
    """One contender in one task: tokens per second of each sample, and Yoke's speed over it in the same
    rounds."""

    task: str
    name: str
    variant: str
    rates: list[float]
    ratios: list[float]


def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    try:
        return compare(flags)
    except InputError as error:
        print(f"bench/peers.py: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/peers.py", allow_abbrev=False)
    parser.add_argument("--python", type=Path, required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF file [that of smollm2-135m]")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--trial", type=int, default=3, help="samples of each of llama.cpp's variants")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated after the first")
    parser.add_argument("--prompt", type=int, default=512, help="length of the prompt in tokens")
    parser.add_argument("--max-seq-len", type=int, default=1024, help="tokens that both caches hold")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of Yoke's weights")
    parser.add_argument("--kv-dtype", default="auto", help="dtype of Yoke's cache")
    parser.add_argument("--ranks", type=int, default=2, help="Yoke's ranks, of one core each")
    parser.add_argument("--threads", type=int, default=2, help="llama.cpp's threads")
    flags = parser.parse_args(argv)
    for name in ("samples", "trial", "tokens", "prompt", "ranks", "threads"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} {getattr(flags, name)}: must be at least 1")
    if flags.prompt + flags.tokens + 1 > flags.max_seq_len:
        parser.error(f"--max-seq-len {flags.max_seq_len}: must be at least --prompt + --tokens + 1")
    return flags


def compare(flags: argparse.Namespace) -> int:
    """Run the comparison; returns the exit code. Raises InputError."""
    if not os.access(flags.python, os.X_OK):
        raise InputError(
            f"--python {flags.python} is not an executable file; the top of bench/peers.py says how to "
            "install it"
        )
    names = {"bf16": "bfloat16", "f16": "float16", "fp32": "float32"}
    job = Job(
        model=flags.model,
        dtype=names.get(flags.dtype, flags.dtype),
        kv_dtype=names.get(flags.kv_dtype, flags.kv_dtype),
        max_seq_len=flags.max_seq_len,
        max_new_tokens=flags.tokens + 1,
        batch=1,
    )
    resolved = resolve(job)
    file = resolved.checkpoint
    if file is None or file.suffix != ".gguf":
        raise InputError(f"--model {flags.model}: llama.cpp reads only GGUF files; give a .gguf file")
    plan = plan_launch(
        read_topology(), LaunchRequest(ranks=flags.ranks, bind_cores=True, cores_per_rank=1)
    )
    load = round(os.getloadavg()[0], 2)  # of other processes, before this benchmark starts
    with tempfile.TemporaryDirectory(prefix="yoke-bench-") as folder:
        files = {"as it is": file}
        for name in FILE_TYPES:
            files[name] = Path(folder) / f"{name}.gguf"
            write_dequantized(file, files[name], name)
        task = {
            "python": str(flags.python),
            "worker": str(CHECKOUT / "bench" / "peers_llama.py"),
            "cpus": [cpu for rank in plan.ranks for cpu in rank.cpus],
            "threads": flags.threads,
            "max_seq_len": flags.max_seq_len,
            "tokens": flags.tokens,
            "trial": flags.trial,
            "samples": flags.samples,
            # For each contender only the fastest variant counts.
            "contenders": {
                "llama.cpp, same file": variants(files, ["as it is"]),
                "llama.cpp, 16 bits": variants(files, list(FILE_TYPES)),
            },
            "result": str(Path(folder) / "result.json"),
        }
        spec = Path(folder) / "task.json"
        spec.write_text(json.dumps(task))
        turns = [sys.executable, str(CHECKOUT / "bench" / "peers_turns.py"), str(spec)]
        payload = json.dumps({"resolved": to_json(resolved), "prompt": flags.prompt})
        # Compiling may take minutes on a busy machine.
        options = RunOptions(start_timeout_s=0, hang_timeout_s=0)
        code = launch(plan, options, new_session(), "bench.peers_rank", payload, turns)
        if code or not Path(task["result"]).exists():
            return code or 1
        found = json.loads(Path(task["result"]).read_text())
        sizes = {name: path.stat().st_size for name, path in files.items()}
    report = {
        "hardware": f"{cpu_name()}, cpus {task['cpus']}",
        "versions": f"{versions()}, llama-cpp-python {found['llama']['version']}",
        "llama_built_with": found["llama"]["system"],
        "yoke": found["yoke"],
        "load": load,
        "file": file.name,
        "file_bytes": sizes,
        **{key: getattr(flags, key) for key in ("samples", "prompt", "tokens", "ranks", "threads")},
        "trial": found["trial"],
        "chosen": found["chosen"],
        "same_tokens": found["same_tokens"],
        "seconds": found["seconds"],
    }
    show(report)
    print(json.dumps(report))
    return 0


def variants(files: dict[str, Path], names: list[str]) -> dict[str, dict[str, Any]]:
    """The variants of the `names` among `files`: {name: what the worker opens}."""
    return {
        f"{name}, {'flash' if flash else 'no flash'}": {"path": str(files[name]), "flash": flash}
        for name in names
        for flash in (True, False)
    }


def rows(report: dict[str, Any]) -> list[Row]:
    """The rows of the table, Yoke first in each task."""
    found = []
    for task, key in TASKS.items():
        count = report["prompt"] if task == "prompt" else 1
        own = [count / sample[key] for sample in report["seconds"][YOKE]]
        found.append(Row(task, YOKE, report["yoke"]["dtype"], own, [1.0] * len(own)))
        for name, chosen in report["chosen"].items():
            rates = [count / sample[key] for sample in report["seconds"][chosen[key]]]
            ratios = [a / b for a, b in zip(own, rates, strict=True)]
            found.append(Row(task, name, chosen[key], rates, ratios))
    return found


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    print(f"{report['hardware']}, load {report['load']}\n{report['versions']}")
    print(f"llama.cpp: {report['llama_built_with']}")
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in report["file_bytes"].items())
    print(f"{report['file']}: {sizes}; {report['yoke']}")
    print(f"{report['samples']} samples of each, interleaved; tokens per second. Yoke's speed over the")
    print("contender's: ratio (of the best samples), paired (median of the ratios of each round)")
    lines = [["task", "contender", "variant", "best", "median", "first token", "ratio", "paired"]]
    found = rows(report)
    best = {row.task: max(row.rates) for row in found if row.name == YOKE}
    for row in found:
        first = f"{1e3 * report['prompt'] / max(row.rates):.0f} ms" if row.task == "prompt" else ""
        lines.append([
            f"{report[row.task]} {'in' if row.task == 'prompt' else 'out'}",
            row.name, row.variant, f"{max(row.rates):.1f}", f"{statistics.median(row.rates):.1f}",
            first, f"{best[row.task] / max(row.rates):.2f}", f"{statistics.median(row.ratios):.2f}",
        ])  # fmt: skip
    table(lines)
    for pair, count in report["same_tokens"].items():
        print(f"{pair}: the first {count} of {report['tokens'] + 1} tokens agree")
    for name, samples in report["seconds"].items():
        idle = max(one["idle_cpu_s"] for one in samples)
        print(f"{name}: at most {1e3 * idle:.0f} ms of cpu time between two samples")


def versions() -> str:
    torch = metadata.version("torch")
    return f"Python {platform.python_version()}, Linux {platform.release()}, torch {torch}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
