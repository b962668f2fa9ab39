"""Carry out a plan: read, quantize and write the weights, one after the other.

Plain rounding has one weight in memory at a time; GPTQ has one layer of the model, and the hidden
states of the calibration text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path

from torch import Tensor

from base.errors import InputError
from quantize.calibrate import Errors, Settings, quantize_block
from quantize.compressed import stored_tensors
from quantize.grid import range_grid, search_grid
from quantize.plan import Plan
from quantize.walk import Walk, whole
from weights.checkpoint import Checkpoint
from weights.pages import release_pages
from weights.quant import QuantWeight, join_rows
from weights.schemes import Scheme
from weights.writer import DTYPES, SafetensorsFile

_PIECE = 4 << 20  # numbers of a weight that are in float32 at once
_RELEASE = 32 << 20  # the source's pages are released after reading this many numbers

Progress = Callable[[int, int], None]


def carry_out(
    plan: Plan,
    folder: Path,
    search: bool,
    calibration: tuple[Settings, Sequence[Tensor]] | None,
    progress: Progress = lambda done, total: None,
) -> list[Errors]:
    """Write all files of a plan into `folder`; returns the errors of each quantized weight.
    `calibration`: GPTQ's settings and texts, or None for plain rounding. `search`: plain rounding
    searches for the best scales. `progress` is called with the count of numbers done, and of all.
    Raises InputError for weights that are not finite."""
    with ExitStack() as stack:
        files = {}
        for name, contents in plan.files.items():
            files[name] = SafetensorsFile(folder / name, contents, digests=False)
            stack.callback(files[name].close)
        places = {name: files[file] for file, held in plan.files.items() for name in held.shapes}
        done, total = 0, sum(prod(shape) for shape in plan.shapes.values())
        unreleased, found = 0, []
        for name, tensors, errors in _weights(plan, search, calibration):
            for stored, tensor in tensors.items():
                places[stored].write(stored, iter((tensor.contiguous(),)))
            if errors is not None:
                found.append(errors)
            size = prod(plan.shapes[name])
            done, unreleased = done + size, unreleased + size
            if unreleased > _RELEASE:
                release_pages(plan.checkpoint.files)
                unreleased = 0
            progress(done, total)
        for file in files.values():
            file.finish()
    # config.json is written last: it makes the folder a model.
    for name in sorted(plan.texts, key=lambda name: name == "config.json"):
        with (folder / name).open("wb") as target:
            target.write(plan.texts[name])
            target.flush()
            os.fsync(target.fileno())
    return found


def _weights(
    plan: Plan, search: bool, calibration: tuple[Settings, Sequence[Tensor]] | None
) -> Iterator[tuple[str, dict[str, Tensor], Errors | None]]:
    """Each weight of the model: its name, the tensors that it is stored as, and its errors (None if it
    is not quantized)."""
    later: set[str] = set()
    if calibration is not None:
        later = {name for name, scheme in plan.schemes.items() if name.startswith("model.layers.")}
    for name in plan.shapes:
        if name in later:
            continue
        weight = whole(plan.checkpoint, name)
        if name in plan.kept:
            check_finite(weight, name, plan.checkpoint)
            yield name, {name: weight.to(DTYPES[plan.kept[name]])}, None
        else:
            errors, quantized = round_weight(name, weight, plan.schemes[name], search, plan)
            yield name, stored_tensors(name, quantized), errors
    if calibration is None:
        return
    settings, texts = calibration
    walk = Walk(plan.checkpoint, plan.config, texts)
    for index in range(plan.config.num_layers):
        block = walk.layer(index)
        for name in later:
            if name.startswith(f"model.layers.{index}."):
                check_finite(whole(plan.checkpoint, name), name, plan.checkpoint)
        for errors, quantized in quantize_block(walk, block, index, settings):
            yield errors.name, stored_tensors(errors.name, quantized), errors
        walk.leave(block)


def check_finite(weight: Tensor, name: str, checkpoint: Checkpoint) -> None:
    """Raise InputError if a number of a weight is not finite."""
    for piece in weight.reshape(-1).split(_PIECE):
        if not piece.isfinite().all():
            file = checkpoint.entries[name].file or checkpoint.path
            raise InputError(
                f"{file}: {name} holds numbers that are not finite; download the model again"
            )


def round_weight(
    name: str, weight: Tensor, scheme: Scheme, search: bool, plan: Plan
) -> tuple[Errors, QuantWeight]:
    """Round a weight [n, k] to the nearest, some rows at a time. Raises InputError."""
    check_finite(weight, name, plan.checkpoint)
    step = max(_PIECE // weight.shape[1], 1)
    parts: list[QuantWeight] = []
    error = square = 0.0
    for rows in weight.split(step):
        exact = rows.float().contiguous()
        try:
            grid = search_grid(exact, scheme) if search else range_grid(exact, scheme)
        except InputError as refused:
            raise InputError(f"{plan.checkpoint.path}: {name}: {refused}") from refused
        q = grid.integers(exact)
        parts.append(grid.packed(q))
        error += float((grid.values(q) - exact).square().sum())
        square += float(exact.square().sum())
    return Errors(name, error, square), join_rows(parts)
