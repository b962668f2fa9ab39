"""Compiled steps on disk: packages that torch compiles ahead of time, and that load in milliseconds.

A step is exported as one graph and compiled by Inductor to a shared object (AOTInductor). It holds no
weights: `load_package` hands it the tensors of the loaded model, which it uses where they are. A later
start therefore neither traces nor imports the compiler.

A package's key is a hash of all that the compiled code depends on: the model's structure (every module,
its settings, the shapes, strides and dtypes of its tensors, never their values), the step, this code,
torch's version, the processor and the number of threads. It holds no path. A package appears whole or
not at all, and its checksums are compared before it is loaded.

Not here: compiling (`engine.compile_child`), and when a run changes to compiled steps
(`engine.background`).
"""

from __future__ import annotations

import copyreg
import fcntl
import functools
import hashlib
import io
import json
import mmap
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.caches import STEPS, STEPS_LOCK
from base.private import NotPrivateError, cache_folder, check_private_file, make_private
from engine.steps import with_reason
from models.decoder import Decoder

MANIFEST = "manifest.json"
LIBRARY = "step.so"  # torch reads step.json beside it
_NORESERVE = 0x4000  # mmap(2): more than the machine has may be mapped
_ROOT = Path(__file__).resolve().parent.parent
# A change in any of these packages may change the graph of a step.
_SOURCES = ("base", "comm", "kernels", "weights", "tp", "models", "engine")


@dataclass(frozen=True)
class StepShape:
    """What a step's example inputs and limits derive from: slots, tokens per slot, most tokens of a
    call of `extend`."""

    num_rows: int
    cache_len: int
    chunk: int


def packages_folder() -> Path:
    """Returns the folder of packages, which only this user can write to. Raises OSError."""
    folder = make_private(cache_folder()[0] / STEPS)
    (folder / STEPS_LOCK).touch(mode=0o600)
    return folder


def describe(model: Decoder) -> bytes:
    """Returns the model's structure as a pickle whose tensors are descriptions: `pickle.loads` builds
    a model of the same shapes with no memory behind its tensors. Raises PicklingError, TypeError or
    AttributeError for a model with a part that cannot be pickled."""
    rooms: dict[tuple[int, int], _Room] = {}
    buffer = io.BytesIO()
    # The pickler in Python: only this one can sort sets, whose order differs between processes.
    pickler = pickle._Pickler(buffer)
    pickler.dispatch = pickler.dispatch | {set: _save_sorted}  # type: ignore[misc]
    pickler.dispatch_table = copyreg.dispatch_table.copy()
    pickler.dispatch_table[Tensor] = lambda tensor: _reduced(tensor, rooms)
    pickler.dispatch_table[nn.Parameter] = lambda tensor: _reduced(tensor, rooms)
    pickler.dump(model)
    return buffer.getvalue()


def key_of(description: bytes, step: str, shape: StepShape) -> str:
    """Returns the key of a step's package."""
    threads = torch.get_num_threads()
    facts = (step, shape, threads, torch.__version__, _processor(), _sources(), description)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def is_complete(package: Path) -> bool:
    """Whether the package is there, is this user's own, and has the checksums that it was made with."""
    try:
        manifest = json.loads((package / MANIFEST).read_bytes())
        for name, checksum in manifest["files"].items():
            check_private_file(package / name)
            if checksum_of(package / name) != checksum:
                return False
    except (OSError, NotPrivateError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def checksum_of(file: Path) -> int:
    """Returns the CRC-32 of a file's bytes."""
    return zlib.crc32(file.read_bytes())


def load_package(package: Path, model: Decoder) -> Callable[..., Tensor]:
    """Returns the compiled step, which runs on the model's own tensors. Raises RuntimeError if it does
    not fit the model."""
    tensors = {
        f"model.{name}": tensor
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    step: int = torch.ops.yoke_kernels.load_step(
        str(package / LIBRARY), list(tensors), list(tensors.values())
    )
    run = torch.ops.yoke_kernels.run_step.default

    def call(*inputs: Tensor) -> Tensor:
        result: Tensor = run(step, inputs)
        return result

    return with_reason(call)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold the lock that keeps `cache clear` from the folder of packages."""
    with (folder / STEPS_LOCK).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def partial_folder(package: Path) -> Iterator[Path]:
    """Yields a folder beside the package for what is not complete, and removes it at the end."""
    work = package.with_name(f"{package.name}.partial-{os.getpid()}")
    work.mkdir(mode=0o700)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove the partial folders of processes that were killed."""
    for work in folder.glob("*.partial-*"):
        pid = work.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(work, ignore_errors=True)


def read_seconds(step: str) -> float:
    """Returns how long compiling a step of this name took last time; 0.0 if that is not known."""
    with suppress(OSError, ValueError):
        return float((packages_folder() / f"{step}.seconds").read_text())
    return 0.0


def keep_seconds(step: str, seconds: float) -> None:
    """Write down how long compiling a step took."""
    with suppress(OSError):
        file = packages_folder() / f"{step}.seconds"
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_text(f"{seconds:.1f}")
        temporary.replace(file)


@dataclass(frozen=True, eq=False)
class _Room:
    """Memory of a described tensor: its size in bytes. Tensors that share memory share a room."""

    num_bytes: int

    def __reduce__(self) -> tuple[Callable[[int], Tensor], tuple[int]]:
        return reserve, (self.num_bytes,)


def reserve(num_bytes: int) -> Tensor:
    """Returns uint8 [num_bytes], zeros that take no memory until somebody writes to them."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags), dtype=torch.uint8)


def rebuild(
    room: Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], parameter: bool
) -> Tensor:
    """Returns the described tensor in its room."""
    tensor = room.view(dtype).as_strided(shape, stride)
    return nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def _save_sorted(pickler: Any, items: set[Any]) -> None:
    pickler.save_reduce(set, (sorted(items),), obj=items)


def _reduced(
    tensor: Tensor, rooms: dict[tuple[int, int], _Room]
) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    num_bytes = span * tensor.element_size() if tensor.numel() else 0
    room = rooms.setdefault((tensor.data_ptr(), num_bytes), _Room(num_bytes))
    is_parameter = isinstance(tensor, nn.Parameter)
    return rebuild, (room, tensor.dtype, tuple(tensor.shape), tensor.stride(), is_parameter)


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _processor() -> str:
    """What Inductor chooses instructions by."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return os.uname().machine
