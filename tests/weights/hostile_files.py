"""Small files that cost a careless reader minutes or gigabytes, and how to make them.

`python tests/weights/hostile_files.py` prints what each costs: processor time and peak memory of
opening it, above those of the start. Each is one kind of cost; variations belong to its format's tests.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 2.0
BYTES, MORE_BYTES = 10, 200 << 20  # ten times the file, and 200 MB


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _gguf(path: Path, pairs: int, tensors: int, body: bytes, length: int) -> None:
    """A sparse file that begins with a header; what follows reads as zeros."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body)
        file.truncate(length)


def _archive(path: Path, program: bytes) -> None:
    (path.parent / "config.json").write_text("{}")
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("m/data.pkl", program)
        opened.writestr("m/data/0", b"\0" * 16)


def empty_texts(folder: Path) -> Path:
    """A vocabulary of 100 million empty texts, all of them in a hole of the file."""
    count, path = 100_000_000, folder / "m.gguf"
    body = _text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, count)
    _gguf(path, 1, 0, body, 64 + len(body) + 8 * count)
    return path


def empty_tensors(folder: Path) -> Path:
    path = folder / "m.gguf"
    _gguf(path, 0, 30_000_000, b"", 1 << 30)
    return path


def long_key(folder: Path) -> Path:
    path = folder / "m.gguf"
    _gguf(path, 1, 0, struct.pack("<Q", 900 << 20), 1 << 30)
    return path


def long_value(folder: Path) -> Path:
    path = folder / "m.gguf"
    _gguf(path, 1, 0, _text(b"general.architecture") + struct.pack("<IQ", 8, 900 << 20), 1 << 30)
    return path


def many_numbers(folder: Path) -> Path:
    path, count = folder / "m.gguf", 120_000_000
    body = _text(b"tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, count)
    _gguf(path, 1, 0, body, 64 + len(body) + 4 * count)
    return path


def name_twice(folder: Path) -> Path:
    """189 KB of JSON in which the last name repeats the one before."""
    names = [f'"n{i}":0' for i in range(20_000)]
    header = ("{" + ",".join([*names, names[-1]]) + "}").encode()
    path = folder / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def manifest_twice(folder: Path) -> Path:
    names = [f'"n{i}":0' for i in range(20_000)]
    (folder / "yoke.json").write_text("{" + ",".join([*names, names[-1]]) + "}")
    return folder


def index_twice(folder: Path) -> Path:
    names = [f'"n{i}":"model-1.safetensors"' for i in range(20_000)]
    text = '{"weight_map":{' + ",".join([*names, names[-1]]) + "}}"
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def many_lists(folder: Path) -> Path:
    header = b'{"a":[' + b"[]," * 8_000_000 + b"[]]}"
    path = folder / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def long_config(folder: Path) -> Path:
    (folder / "config.json").write_text('{"architectures":[' + "[]," * 8_000_000 + "[]]}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


def deep_json(folder: Path) -> Path:
    header = b"[" * 1_000_000
    path = folder / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def marks(folder: Path) -> Path:
    """A pickle that makes a mark and looks for it 120,000 times, above a stack of 200,000."""
    program = b"\x80\x02" + b"N" * 200_000 + b"(t" * 120_000 + b"."
    path = folder / "m.pth"
    _archive(path, program)
    return path


def deep_marks(folder: Path) -> Path:
    path = folder / "m.pth"
    _archive(path, b"\x80\x02" + b"(" * 240_000 + b"t" * 240_000 + b".")
    return path


def many_operations(folder: Path) -> Path:
    path = folder / "m.pth"
    _archive(path, b"\x80\x02]" + b"Na" * 7_000_000 + b".")
    return path


def lists_in_lists(folder: Path) -> Path:
    """A list that is put into itself again and again: what is printed of it must end."""
    program = io.BytesIO()
    value: list[object] = []
    for _ in range(200):
        value = [value, value]
    pickle.dump({"w": value}, program, protocol=2)
    path = folder / "m.pth"
    _archive(path, program.getvalue())
    return path


CASES: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (
        empty_texts, empty_tensors, long_key, long_value, many_numbers, name_twice, manifest_twice,
        index_twice, many_lists, long_config, deep_json, marks, deep_marks, many_operations,
        lists_in_lists,
    )
}  # fmt: skip

# Opens a file as ranks do, after a good one, and prints what the attempt cost above that.
_CHILD = """
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from weights.open import open_checkpoint
from base.errors import InputError
from weights.formats import gguf_io, pickle_io, safetensors_io, yoke_io
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before, start, said = peak(), time.process_time(), ""
try:
    dict(open_checkpoint(Path(sys.argv[2])).config)
except InputError as error:
    said = str(error)
print(json.dumps([time.process_time() - start, peak() - before, said]))
"""


@dataclass(frozen=True)
class Cost:
    """`seconds` of processor time; peak `memory` above the start and the file's `size`, in bytes; what
    was `said`."""

    seconds: float
    memory: int
    size: int
    said: str

    @property
    def bearable(self) -> bool:
        return self.seconds <= SECONDS and self.memory <= BYTES * self.size + MORE_BYTES


def cost_of(make: Callable[[Path], Path]) -> Cost:
    """Make the file in a folder of its own, and open it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder))
        files = [path] if path.is_file() else list(path.iterdir())
        size = sum(file.stat().st_blocks * 512 for file in files)
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, str(CHECKOUT), str(path)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        seconds, memory, said = json.loads(done.stdout)
    return Cost(seconds, memory, size, said)


if __name__ == "__main__":
    print(f"{'case':<18}{'on disk':>12}{'seconds':>10}{'memory':>12}  said")
    for name, make in CASES.items():
        cost = cost_of(make)
        mib, said = cost.memory >> 20, cost.said[-90:]
        print(f"{name:<18}{cost.size:>12}{cost.seconds:>10.2f}{mib:>8} MiB  {said}")
    print(f"limits: {SECONDS:g} s, ten times the bytes on disk and {MORE_BYTES >> 20} MiB")
