"""Carry out the plan of a GGUF file: tensors are read, quantized and written, one after the other.

With a calibration text, the importance of a layer's columns is measured just before the layer is
written: one layer of the model is in memory, and the hidden states of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from base.errors import InputError
from models.config import HEAD
from models.load import config_of
from quantize.calibrate import Errors
from quantize.gguf_file import GgufFile
from quantize.gguf_pack import to_blocks
from quantize.gguf_plan import GgufPlan
from quantize.gguf_recipe import PLAIN
from quantize.gguf_search import quantize_rows
from quantize.gguf_tensors import GgufTensor, stored_values
from quantize.importance import head_importance, layer_importance
from quantize.run import check_finite
from quantize.walk import Walk
from weights.checkpoint import Checkpoint
from weights.open import open_checkpoint
from weights.pages import release_pages

_PIECE = 4 << 20  # numbers of a weight that are in float32 at once
_LARGEST = {"F16": 65504.0, "blocks": 65504.0 / 4}  # a scale is at most a few times the largest number
_DTYPES = {"F32": torch.float32, "F16": torch.float16}

Progress = Callable[[int, int], None]


def carry_out_gguf(
    plan: GgufPlan,
    path: Path,
    texts: Sequence[Tensor] | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Errors]:
    """Write the file; returns the errors of each quantized weight. `texts`: the calibration text, int64
    [T] each, or None. `progress` is called with the count of numbers done, and of all. Raises
    InputError for weights that are not finite, or too large for float16 scales."""
    errors: list[Errors] = []
    done, total = 0, sum(prod(each.shape) for each in plan.tensors)
    measured = _Importance(plan, texts)
    with GgufFile(path, plan.keys, plan.contents) as file:
        for name, values in plan.factors.items():
            file.write(name, torch.tensor(values, dtype=torch.float32))
        for each in plan.tensors:
            importance = measured.of(each.name)
            file.write(each.name, torch.cat(_stored(plan, each, importance, errors)))
            release_pages(plan.checkpoint.files)
            done += prod(each.shape)
            progress(done, total)
        file.finish()
    return errors


class _Importance:
    """The importance of columns, measured layer by layer as the tensors are written in order."""

    def __init__(self, plan: GgufPlan, texts: Sequence[Tensor] | None) -> None:
        self._walk = None if texts is None else Walk(plan.checkpoint, plan.config, texts)
        self._last = plan.config.num_layers
        self._next = 0
        self._found: dict[str, Tensor] = {}

    def of(self, stored_name: str) -> Mapping[str, Tensor]:
        """Those of the weights in a tensor, by canonical name, if they are known."""
        if self._walk is None:
            return {}
        match = re.match(r"blk\.(\d+)\.", stored_name)
        if match is not None and int(match[1]) == self._next:
            self._found = layer_importance(self._walk, self._next)
            self._next += 1
        elif stored_name == "output.weight" and self._next == self._last:
            self._found = head_importance(self._walk)
        return self._found


def _stored(
    plan: GgufPlan, tensor: GgufTensor, importance: Mapping[str, Tensor], errors: list[Errors]
) -> list[Tensor]:
    """What a tensor is stored as: pieces of rows of bytes or numbers. Adds to `errors`."""
    form, found = plan.forms[tensor.name], []
    for part in tensor.parts:
        values = stored_values(plan.checkpoint, part, plan.config)
        check_finite(values, part.name, plan.checkpoint)
        if form in PLAIN:
            _check_size(values, form, part.name, plan)
            found.append(values.to(_DTYPES[form], copy=True))
            continue
        _check_size(values, "blocks", part.name, plan)
        error = square = 0.0
        for rows in values.split(max(_PIECE // values.shape[1], 1)):
            exact = rows.float().contiguous()
            quantized = quantize_rows(form, exact, importance.get(part.name))
            found.append(to_blocks(form, quantized))
            error += float((quantized.dequantize() - exact).square_().sum())
            square += float(exact.square().sum())
        errors.append(Errors(part.name, error, square))
    return found


def _check_size(values: Tensor, form: str, name: str, plan: GgufPlan) -> None:
    most = _LARGEST.get(form)
    if most is not None and float(values.abs().max()) > most:
        raise InputError(
            f"{plan.checkpoint.path}: {name} holds numbers beyond {most:g}, which GGUF's 16-bit scales "
            "cannot represent; the file may be damaged: download it again"
        )


@dataclass(frozen=True)
class _Expected:
    shape: tuple[int, ...]
    form: str


def read_back_gguf(plan: GgufPlan, path: Path) -> Checkpoint:
    """The written file as a checkpoint. Raises InputError unless it holds the plan's model: the same
    dimensions, and every weight in its shape and form."""
    found = open_checkpoint(path)
    expected = {
        part.name: _Expected(tuple(plan.checkpoint.entries[part.name].shape), plan.forms[each.name])
        for each in plan.tensors
        for part in each.parts
    }
    stored = {
        name: _Expected(tuple(entry.shape), entry.stored_as) for name, entry in found.entries.items()
    }
    wrong = [name for name in expected if stored.get(name) != expected[name]]
    if wrong or len(stored) != len(expected) or config_of(found).vocab_size != plan.config.vocab_size:
        raise InputError(f"{path} was not written as planned ({', '.join(wrong[:3])}); write it again")
    return found


def head_form(plan: GgufPlan) -> str:
    """The form of the head, or of the embedding that is the head."""
    names = {part.name: each.name for each in plan.tensors for part in each.parts}
    return plan.forms[names.get(HEAD, "token_embd.weight")]


def forms_of(plan: GgufPlan) -> dict[str, str]:
    """The form of each weight, by canonical name."""
    return {part.name: plan.forms[each.name] for each in plan.tensors for part in each.parts}
