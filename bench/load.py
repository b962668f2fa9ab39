"""How close is loading to reading the file? `python bench/load.py [--ranks N] [--runs N] [FOLDER]`

Loading a rank's part of a checkpoint with `models.load.load_model`, against the bound: reading the same
number of bytes of the same files into one existing buffer. Both read from the page cache (the files are
read once before), interleaved in one run. Without FOLDER, a checkpoint of random weights of 1.3 GB is
made in a temporary folder. Prints best and median; the last line is JSON.

What is not here: disks. Loading from a cold disk is limited by the disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from comm.group import Group
from models.config import ModelConfig, expected_shapes
from models.load import config_of, load_model
from weights.open import open_checkpoint

CONFIG = ModelConfig(2048, 8, 32, 8, 64, 8192, 32000, 2048)


def make_checkpoint(folder: Path) -> None:
    """Write random weights in Hugging Face's layout, one layer per file."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": CONFIG.dim,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "intermediate_size": CONFIG.ffn_dim,
        "vocab_size": CONFIG.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = list(expected_shapes(CONFIG).items())
    for i in range(0, len(shapes), 9):
        part = {name: torch.randn(shape).bfloat16() for name, shape in shapes[i : i + 9]}
        save_file(part, folder / f"model-{i:05d}.safetensors")


def read_bytes(files: list[Path], wanted: int, buffer: memoryview) -> float:
    """Seconds to read `wanted` bytes of the files, one buffer at a time."""
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while wanted > 0 and (count := stream.readinto(buffer[: min(wanted, len(buffer))])):
                wanted -= count
    return time.perf_counter() - start


def load(folder: Path, rank: int, size: int) -> tuple[float, int]:
    """Seconds to load one rank's part, and its bytes."""
    start = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    model = load_model(config_of(checkpoint), checkpoint, Group(rank, size), torch.bfloat16)
    return time.perf_counter() - start, sum(parameter.nbytes for parameter in model.parameters())


def folders(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="yoke-bench-") as name:
        make_checkpoint(Path(name))
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--ranks", type=int, default=2, help="world size; rank 0's part is loaded")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for folder in folders(options.folder):
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix != ".json")
        buffer = memoryview(bytearray(8 << 20))
        total = sum(file.stat().st_size for file in files)
        read_bytes(files, total, buffer)
        loads, reads, shard = [], [], 0
        for _ in range(options.runs):
            seconds, shard = load(folder, 0, options.ranks)
            loads.append(seconds)
            reads.append(read_bytes(files, shard, buffer))
    rate = shard / 1e9
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread")
    print(f"rank 0 of {options.ranks}: {rate:.2f} GB of {total / 1e9:.2f} GB")
    for name, times in (("load", loads), ("read", reads)):
        best, median = min(times), statistics.median(times)
        print(f"{name}: best {best:.3f} s ({rate / best:.1f} GB/s), median {median:.3f} s")
    ratio = statistics.median(a / b for a, b in zip(loads, reads, strict=True))
    print(f"loading takes {ratio:.2f} times as long as reading (median of pairs)")
    print(json.dumps({"shard_bytes": shard, "load_s": loads, "read_s": reads, "ratio": ratio}))


if __name__ == "__main__":
    main()
