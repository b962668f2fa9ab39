"""Execute a plan: a few threads read a piece, checksum it and write it to its place.

Each thread holds one piece of some 4 MiB, and mapped pages of the source are released as the work
proceeds. So the process needs little memory for any model and any number of ranks. The files that make
a folder loadable (`yoke.json`, `config.json`) are written last.

What is not here: what goes where (`reshard.plan`), and checking the result (`reshard.verify`).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from base.errors import InputError
from reshard.plan import Output, Piece, ReshardPlan, manifest_of
from weights.checkpoint import Checkpoint, Entry, Slices
from weights.companions import companions
from weights.files import parse_json
from weights.formats.quant_config import declared
from weights.formats.yoke_io import YokeFolder, unequal_replicas
from weights.formats.yoke_manifest import MANIFEST, StoredTensor, to_json
from weights.nested import is_nested
from weights.pages import release_pages
from weights.writer import DTYPES, SafetensorsFile

PIECE_BYTES = 4 << 20
RELEASE_BYTES = 32 << 20


@dataclass
class Reader:
    """Reads pieces of a checkpoint and releases its mapped pages after every `RELEASE_BYTES`."""

    checkpoint: Checkpoint
    _touched: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pieces(self, piece: Piece, head_dim: int) -> Iterator[Tensor]:
        """Yields a piece of a tensor in its output dtype, some contiguous rows at a time."""
        tensor = piece.tensor
        held = self.checkpoint.stored if tensor.is_stored else self.checkpoint.entries
        entry = held[tensor.name]
        parts = [tensor.slices(start, stop) for start, stop in piece.ranges]
        if not tensor.shape:
            yield as_stored(entry, tensor, ())
        elif tensor.along == 0:
            for slices in parts:
                yield from self._rows(entry, tensor, slices[0], [slices], head_dim)
        else:
            yield from self._rows(entry, tensor, parts[0][0], parts, head_dim)

    def _rows(
        self, entry: Entry, tensor: StoredTensor, rows: slice, parts: list[Slices], head_dim: int
    ) -> Iterator[Tensor]:
        """Yields `rows` of the `parts`, which are concatenated along the sharded dimension."""
        # Counts whole rows: a slice of columns still maps all their pages.
        row_bytes = max(_row_bytes(tensor), 1)
        step = max(PIECE_BYTES // row_bytes, 1)
        # Some formats store the rows of a head in another order and must read whole heads.
        step = max(step // head_dim, 1) * head_dim if step >= head_dim else step
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            here = [as_stored(entry, tensor, (slice(start, stop), *each[1:])) for each in parts]
            yield here[0] if len(here) == 1 else torch.cat(here, tensor.along)
            self.touched((stop - start) * row_bytes)

    def touched(self, size: int) -> None:
        """Record that `size` more bytes of the source have been read."""
        with self._lock:
            self._touched += size
            if self._touched < RELEASE_BYTES:
                return
            self._touched = 0
        release_pages(self.checkpoint.files)


def _row_bytes(tensor: StoredTensor) -> int:
    """An upper bound of the bytes of a row in the source (a dequantized number has four)."""
    size = DTYPES[tensor.dtype].itemsize
    for count in tensor.shape[1:]:
        size *= count
    return size * 2 if tensor.dtype == "BF16" else size


def as_stored(entry: Entry, tensor: StoredTensor, slices: tuple[slice, ...]) -> Tensor:
    """A part of an entry, in the dtype or the quantization blocks that `tensor` has in the output."""
    if tensor.blocks is not None:
        assert entry.read_raw is not None
        return entry.read_raw(slices).contiguous()
    # Some formats return float32 for narrower stored numbers: the conversion restores the stored bits.
    part = (entry.peek or entry.read)(slices)
    return part.to(DTYPES[tensor.dtype]).contiguous()


def num_threads() -> int:
    """At least two: one waits for the disk while another computes. More than four do not help."""
    return max(2, min(4, len(os.sched_getaffinity(0))))


def check_replicas(folder: YokeFolder, reader: Reader) -> None:
    """Raise InputError if ranks that hold the same elements disagree on them."""
    for tensor in folder.manifest.tensors:
        ranks = unequal_replicas(folder, tensor)
        if ranks is not None:
            raise InputError(
                f"{tensor.name}: ranks {ranks[0]} and {ranks[1]} hold copies of the same part, and "
                f"these differ; {folder.path} is damaged: copy it again"
            )
        held = sum(stop - start for part in tensor.parts for start, stop, _ in tensor.held(part))
        reader.touched(_row_bytes(tensor) * held)


def write(
    plan: ReshardPlan, reader: Reader, folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Write the files of `plan` into `folder`. Calls `progress` with (bytes written, total bytes)."""
    done, total = 0, sum(contents.data_bytes for contents in plan.files.values())
    lock, stop = threading.Lock(), threading.Event()
    files: dict[str, SafetensorsFile] = {}

    def on_written(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    def run(output: Output) -> str:
        return files[output.file].write(output.name, pieces_of(output), on_written)

    def pieces_of(output: Output) -> Iterator[Tensor]:
        for piece in output.pieces:
            for part in reader.pieces(piece, plan.dims.head_dim):
                if stop.is_set():
                    raise InputError("stopped")  # never shown: another error came first
                yield part

    digests: dict[tuple[str, str], str] = {}
    with ThreadPoolExecutor(num_threads()) as pool:
        try:
            for name, contents in plan.files.items():
                # A Hugging Face folder has no place for digests, and they cost more than the rest.
                files[name] = SafetensorsFile(folder / name, contents, digests=plan.form == "yoke")
            futures = [(output, pool.submit(run, output)) for output in plan.outputs]
            for output, future in futures:
                digests[output.file, output.name] = future.result()
            for _ in pool.map(SafetensorsFile.finish, files.values()):
                pass
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            for file in files.values():
                file.close()
    _write_last(plan, reader.checkpoint, folder, digests)


def _write_last(
    plan: ReshardPlan, checkpoint: Checkpoint, folder: Path, digests: dict[tuple[str, str], str]
) -> None:
    """Write the small files in such an order that only the last one makes the folder loadable."""
    texts = {name: text.encode() for name, text in plan.texts.items()}
    texts |= companions(checkpoint)
    config = texts.get("config.json")
    if config is not None and checkpoint.format != "gguf":
        given = parse_json(config)
        # Only the text model is written, so only its configuration is. What it says about quantization
        # is that of the result; before it did, libraries wrote a file of their own beside it.
        if is_nested(given) or declared(given) != declared(plan.config):
            alone = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
            texts["config.json"] = alone.encode()
    if plan.form == "yoke":
        texts[MANIFEST] = to_json(manifest_of(plan, digests)).encode()
    for name in sorted(texts, key=lambda name: (name == MANIFEST, name == "config.json")):
        with (folder / name).open("wb") as target:
            target.write(texts[name])
            target.flush()
            os.fsync(target.fileno())


def needed_bytes(plan: ReshardPlan, checkpoint: Checkpoint) -> int:
    """Bytes needed on disk, with an allowance for the manifest and for file systems' rounding."""
    small = sum(map(len, companions(checkpoint).values()))
    small += sum(len(text.encode()) for text in plan.texts.values())
    return plan.total_bytes + small + 200 * len(plan.outputs) + 8192 * (len(plan.files) + 8)
