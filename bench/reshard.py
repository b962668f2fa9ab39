"""How fast is resharding against copying the same bytes? `python bench/reshard.py [GIB] [RUNS] [DIR]`

For 1 -> 4, 4 -> 8 and 8 -> 1 ranks, in alternating pairs: first a copy of the source's files
(`shutil.copyfile`, which copies inside the kernel), then the resharder, in a process of its own whose
start is not counted. Both end when their files are on the disk (fsync of each). The source is read
once before, so it is in the page cache if memory suffices. The output is removed each time, and `sync`
waits for the disk before the next measurement.

The checkpoint is random bf16 in the shape of a Llama with 32 query and 8 KV heads. Prints best and
median of each, and of the ratio of each pair; the last line is JSON. What is not here: reading from a
cold disk.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from weights.writer import SafetensorsFile, Tensors  # noqa: E402

PAIRS = ((1, 4), (4, 8), (8, 1))
LIMIT = 2.0
# Answers each line with an exit code and the seconds taken, without the start of Python and torch.
WORKER = """
import contextlib, io, sys, time
sys.path.insert(0, {checkout!r})
import reshard.command, reshard.verify, weights.formats.safetensors_io
for line in sys.stdin:
    ranks, source, out = line.rstrip("\\n").split("\\t")
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        code = reshard.command.main(["--to", ranks, source, out])
    print(code, time.perf_counter() - start, flush=True)
"""


def write_source(folder: Path, gib: float) -> int:
    """Write a Hugging Face folder of about `gib` GiB; returns the bytes of its weights file."""
    dim, ffn, vocab, head_dim = 2048, 5632, 32000, 64
    layer = 2 * (dim * dim * 2 + dim * 8 * head_dim * 2 + 3 * dim * ffn)
    num_layers = max(round((gib * 2**30 - 4 * vocab * dim) / layer), 1)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = ("BF16", shape)

    add("model.embed_tokens", vocab, dim)
    for i in range(num_layers):
        block = f"model.layers.{i}"
        for name, rows in (("q", dim), ("k", 8 * head_dim), ("v", 8 * head_dim), ("o", dim)):
            add(f"{block}.self_attn.{name}_proj", rows, dim)
        for name in ("gate", "up"):
            add(f"{block}.mlp.{name}_proj", ffn, dim)
        add(f"{block}.mlp.down_proj", dim, ffn)
        for name in ("input", "post_attention"):
            add(f"{block}.{name}_layernorm", dim)
    add("model.norm", dim)
    add("lm_head", vocab, dim)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": ffn,
        "vocab_size": vocab,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    contents = Tensors(shapes, {"format": "pt"})
    file = SafetensorsFile(folder / "model.safetensors", contents)
    for name, (_, shape) in shapes.items():
        file.write(name, [torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16)])
    file.finish()
    return contents.file_bytes


def copy(source: Path, out: Path) -> float:
    """Seconds to copy a folder's files, until they are on the disk."""
    start = time.perf_counter()
    out.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, out / file.name)
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def reshard(worker: subprocess.Popen[str], ranks: int, source: Path, out: Path) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{ranks}\t{source}\t{out}\n")
    worker.stdin.flush()
    code, seconds = worker.stdout.readline().split()
    assert code == "0", f"resharding {source} to {ranks} ranks failed"
    return float(seconds)


def clear(folder: Path) -> None:
    shutil.rmtree(folder)
    os.sync()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main(gib: float, num_runs: int, where: Path | None) -> int:
    hardware = f"{cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cpus"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.release()}"
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(checkout=str(CHECKOUT))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    results = {}
    with tempfile.TemporaryDirectory(prefix="yoke-reshard-", dir=where) as name:
        folder = Path(name)
        size = write_source(folder / "ranks-1", gib)
        for ranks in (4, 8):
            reshard(worker, ranks, folder / "ranks-1", folder / f"ranks-{ranks}")
        os.sync()
        print(f"{hardware}\n{versions}\n{size / 2**30:.2f} GiB, {num_runs} pairs of each, interleaved")
        print("page cache warm, fsync counted on both sides")
        print(f"{'ranks':<10}{'copy':>16}{'reshard':>18}{'ratio':>16}")
        for first, second in PAIRS:
            source = folder / f"ranks-{first}"
            for file in source.iterdir():  # into the page cache
                with file.open("rb", buffering=0) as opened:
                    while opened.read(1 << 24):
                        pass
            times: list[tuple[float, float]] = []
            for _ in range(num_runs):
                copied = copy(source, folder / "copy")
                clear(folder / "copy")
                made = reshard(worker, second, source, folder / "made")
                clear(folder / "made")
                times.append((copied, made))
            copies, reshards = [copied for copied, _ in times], [made for _, made in times]
            ratios = [made / copied for copied, made in times]
            row = {
                "copy_best_s": min(copies),
                "copy_median_s": statistics.median(copies),
                "reshard_best_s": min(reshards),
                "reshard_median_s": statistics.median(reshards),
                "ratio_best": min(reshards) / min(copies),
                "ratio_median": statistics.median(ratios),
            }
            results[f"{first}->{second}"] = {key: round(value, 3) for key, value in row.items()}
            print(
                f"{first:>2} -> {second:<4}"
                f"{min(copies):6.2f} {statistics.median(copies):6.2f} s"
                f"{min(reshards):9.2f} {statistics.median(reshards):6.2f} s"
                f"{row['ratio_best']:8.2f} {row['ratio_median']:6.2f}"
            )
        print(f"(best and median; the limit for the ratio is {LIMIT})")
    assert worker.stdin is not None
    worker.stdin.close()
    worker.wait()
    report = {"hardware": hardware, "versions": versions, "gib": size / 2**30, "runs": num_runs}
    print(json.dumps(report | {"limit": LIMIT, "fsync": True, "cache": "warm", "results": results}))
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(
        main(
            float(words[0]) if words else 1.1,
            int(words[1]) if len(words) > 1 else 5,
            Path(words[2]) if len(words) > 2 else None,
        )
    )
