"""Mutations of small valid files of every format: InputError, or a checkpoint whose every entry can be
read or is refused. Anything else (another exception, a crash, memory beyond a limit) fails.

The same mutations each time; YOKE_FUZZ=10000 tries that many others for each format.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base.errors import InputError
from tests.weights.samples import (
    CONFIG,
    llama,
    tiny,
    write_bin,
    write_gguf,
    write_gpt_fast,
    write_json,
    write_meta,
    write_safetensors,
)
from weights.open import open_checkpoint

EXAMPLES = int(os.environ.get("YOKE_FUZZ", "0"))
pytestmark = pytest.mark.usefixtures("little_memory")

FUZZ = settings(
    max_examples=EXAMPLES or 2000,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# Numbers at which readers stumble, of all widths.
INTEGERS = [0, 1, 2, 7, 31, 127, 128, 255, 256, 65535, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 33]
INTEGERS += [1 << 40, 1 << 60, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
PLACES = st.floats(0, 1, exclude_max=True)
MUTATIONS = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
    st.tuples(st.just("byte"), PLACES, st.integers(0, 255)),
    st.tuples(st.just("write"), PLACES, st.sampled_from(INTEGERS)),
    st.tuples(st.just("insert"), PLACES, st.sampled_from(INTEGERS)),
    st.tuples(st.just("cut"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("repeat"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("truncate"), PLACES, st.just(0)),
    st.tuples(st.just("number"), PLACES, st.sampled_from([-1, *INTEGERS])),
    st.tuples(st.just("text"), PLACES, st.sampled_from([b"-", b"9" * 30, b"NaN", b'"', b"[", b"\xff"])),
)


def mutate(content: bytes, mutations: list[tuple[str, float, int | bytes]], header: int) -> bytes:
    """`content` changed, mostly within its first `header` bytes (its last, if that is negative)."""
    for i, (kind, place, value) in enumerate(mutations):
        span = len(content) if i % 3 == 2 else min(abs(header), len(content))
        at = int(place * span) + (len(content) - span if header < 0 else 0)
        before, after = content[:at], content[at:]
        if isinstance(value, bytes):
            content = before + value + after[len(value) :]
        elif kind == "flip" and after:
            content = before + bytes([after[0] ^ 1 << value]) + after[1:]
        elif kind == "byte":
            content = before + bytes([value]) + after[1:]
        elif kind == "write":
            width = 8 if value >= 1 << 32 or at % 2 else 4
            content = before + struct.pack("<Q", value)[:width] + after[width:]
        elif kind == "insert":
            content = before + struct.pack("<Q", value) + after
        elif kind == "cut":
            content = before + after[value:]
        elif kind == "repeat":
            content = before + after[:value] * 2 + after[value:]
        elif kind == "truncate":
            content = before
        elif kind == "number":  # the next number that is written in digits, for JSON
            content = before + re.sub(rb"\d+", str(value).encode(), after, count=1)
    return content


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, int]]:
    """For each format: what is opened, the file of it that is damaged, and where its header is."""
    root = tmp_path_factory.mktemp("good")
    safetensors = write_safetensors(root / "safetensors", tiny())
    index = write_bin(root / "bin", tiny(), 2)
    meta = write_meta(root / "meta", llama(), 2)
    fast = write_gpt_fast(root / "fast", llama())
    write_json(fast / "config.json", CONFIG)
    pth = write_bin(root / "pth", tiny(), 1)
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((64, 64)).astype(np.float32)
    arrays = {
        "blk.0.attn_q.weight": quantize(rows, Kind.Q8_0),
        "blk.0.attn_k.weight": rows[:32],
        "blk.0.ffn_up.weight": quantize(rows[:4], Kind.Q4_0),
        "output_norm.weight": rows[0],
    }
    gguf = write_gguf(
        root / "m.gguf", arrays, {"blk.0.attn_q.weight": Kind.Q8_0, "blk.0.ffn_up.weight": Kind.Q4_0}
    )
    archive = pth / "pytorch_model.bin"
    # An archive lists its records at its end, and torch's pickle is its first record.
    return {
        "safetensors": (safetensors, safetensors / "model.safetensors", 300),
        "config": (safetensors, safetensors / "config.json", 400),
        "index": (index, index / "pytorch_model.bin.index.json", 400),
        "pickle": (pth, archive, 700),
        "archive": (pth, archive, -900),
        "meta": (meta, meta / "consolidated.01.pth", 4000),
        "params": (meta, meta / "params.json", 400),
        "fast": (fast, fast / "model.pth", 4000),
        "gguf": (gguf, gguf, 700),
    }


def read_all(path: Path) -> None:
    """Everything a rank would do with a checkpoint; InputError is a fine answer to all of it."""
    try:
        checkpoint = open_checkpoint(path)
        dict(checkpoint.config)
    except InputError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 3000
    if message:
        return
    for entry in checkpoint.entries.values():
        try:
            part = entry.read(tuple(slice(0, size) for size in entry.shape))
        except InputError:
            continue
        assert part.shape == entry.shape
        rows = tuple(slice(size // 3, size) for size in entry.shape)
        a, b = entry.read(rows), part[rows]
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "name",
    ["safetensors", "config", "index", "pickle", "archive", "meta", "params", "fast", "gguf"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutations(name: str, good: dict[str, tuple[Path, Path, int]]) -> None:
    opened, file, header = good[name]
    content = file.read_bytes()

    @FUZZ
    @given(st.lists(MUTATIONS, min_size=1, max_size=4))
    def damage(mutations: list[tuple[str, float, int | bytes]]) -> None:
        file.write_bytes(mutate(content, mutations, header))
        read_all(opened)

    try:
        damage()
    finally:
        file.write_bytes(content)
    read_all(opened)
