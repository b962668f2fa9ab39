"""Reads the weights of layers that hold them quantized (`models.quant_rules` decides which do).

With `quant` None all quantized weights are dequantized. Else the schemes that the matmuls support are
kept, and plain weights are rounded as they are read, if that is asked for (`models.quant_rules.Quant`).
A layer of fused weights is one matmul, so its parts must have the same scheme; where a file mixes
schemes (GGUF's K-quants beside others) the layer is dequantized.

Shard first, pack last: a rank reads its part of each weight in the logical form (weights.quant), with
the same bits at any world size, and then packs it. Rounding works on whole rows or groups, before the
columns are sharded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from base.errors import InputError
from models.config import EMBEDDING, HEAD, ModelConfig
from models.mlp import ExpertStack
from models.quant_rules import (
    Asked,
    Quant,
    check_quant,
    held_quantized,
    matmul_scheme,
)
from tp.layers import Linear
from weights.checkpoint import Checkpoint, Entry, Slices
from weights.quant import QuantWeight, join_rows
from weights.quantize import quantize_rtn
from weights.schemes import Scheme, is_plain

BLOCK_BYTES = 32 << 20  # bytes of a plain weight in float32 that are rounded at once


Holder = Linear | ExpertStack


@dataclass(frozen=True)
class PackedLayer:
    """A layer that will hold its weights quantized: its fused weights (`names`, `entries`) and their
    scheme. `kept`: the file stores them in this scheme, so they are not rounded."""

    layer: Holder
    names: tuple[str, ...]
    entries: tuple[Entry, ...]
    scheme: Scheme
    kept: bool


def plan_layers(
    config: ModelConfig,
    checkpoint: Checkpoint,
    linears: Sequence[tuple[Holder, tuple[str, ...]]],
    quant: Quant | None,
    world_size: int,
) -> list[PackedLayer]:
    """Those of `linears` (layers with the names of their weights) that will hold quantized weights.
    Raises InputError if the file or the model does not allow `quant`."""
    if quant is None:
        return []
    asked = quant.asked
    entries = checkpoint.entries
    layers = {names: layer for layer, names in linears}
    if asked is not None:
        check_quant(config, asked, world_size)
        for names in layers:
            _check_asked(checkpoint, names, asked)
    return [
        PackedLayer(
            layers[each.names],
            each.names,
            tuple(entries[n] for n in each.names),
            each.scheme,
            each.kept,
        )
        for each in held_quantized(config, list(layers), entries, asked, world_size)
    ]


def _check_asked(checkpoint: Checkpoint, names: tuple[str, ...], asked: Asked) -> None:
    """Raise InputError where weights would be rounded a second time with a loss. Rounding to 8 bits
    loses little for 8-bit weights and GGUF's finer formats; a 4-bit head is kept if 8 bits are asked
    for."""
    wanted = matmul_scheme(names, asked)
    is_head = names[0] in (HEAD, EMBEDDING)
    for part in (checkpoint.entries[name] for name in names):
        if wanted is None or is_plain(part.stored_as) or part.scheme == wanted:
            continue
        if wanted.bits == 8 and (is_head or part.scheme is None or part.scheme.bits == 8):
            continue
        has = part.stored_as if part.scheme is None else f"{part.scheme.name} ({part.stored_as})"
        raise InputError(
            f"{asked.words}: {checkpoint.path} is quantized already, {names[0]} as {has}; use "
            "quant=auto, which keeps that, or a file that is not quantized"
        )


def read_layer(planned: PackedLayer, slices: Sequence[Slices]) -> list[QuantWeight]:
    """This rank's part of a layer: each of its weights, cut to its slices; those of one scheme are
    joined along the rows."""
    return _read(planned, planned.entries, slices)


def read_experts(
    planned: PackedLayer, slices: Sequence[Slices], on_expert: Callable[[], None] = lambda: None
) -> Iterator[list[QuantWeight]]:
    """As `read_layer`, for each expert of a stack in turn; `on_expert` is called after each expert."""
    assert isinstance(planned.layer, ExpertStack)
    size = len(planned.entries) // planned.layer.num_experts
    for i in range(0, len(planned.entries), size):
        yield _read(planned, planned.entries[i : i + size], slices[i : i + size])
        on_expert()


def _read(
    planned: PackedLayer, entries: Sequence[Entry], slices: Sequence[Slices]
) -> list[QuantWeight]:
    return [
        join_rows(
            [
                entry.quant(*part)
                if planned.kept and entry.quant is not None
                else read_rounded(entry, part, planned.scheme)
                for entry, part in zip(entries, slices, strict=True)
            ]
        )
    ]


def read_rounded(entry: Entry, slices: Slices, scheme: Scheme) -> QuantWeight:
    """A part of a weight, rounded to a scheme in blocks of rows. Scales are those of the whole
    (unsharded) weight."""
    rows, columns = slices
    k = entry.shape[1]
    size = scheme.group_size or k
    left, right = columns.start // size * size, -(-columns.stop // size) * size
    step = max(1, BLOCK_BYTES // (4 * max(right - left, 1)))
    read = entry.peek or entry.read
    found = []
    for start in range(rows.start, rows.stop, step):
        part = read((slice(start, min(start + step, rows.stop)), slice(left, right)))
        rounded = quantize_rtn(part, scheme)
        found.append(rounded.columns(columns.start - left, columns.stop - left))
    if not found:  # the last ranks may hold no rows of a small vocabulary
        found = [quantize_rtn(torch.zeros(1, right - left), scheme).rows(0, 0)]
    return join_rows(found)


def summary(planned: Sequence[PackedLayer], linears: Sequence[tuple[Holder, tuple[str, ...]]],
            checkpoint: Checkpoint, quant: Quant | None) -> str:  # fmt: skip
    """One line for the user on how the weights are held; "" if nothing differs from the file, or if
    all of it is dequantized (`quant` None)."""
    if quant is None:
        return ""
    held = {id(each.layer) for each in planned}
    counts = Counter(each.scheme.name for each in planned)
    parts = [f"{count} of {name}" for name, count in counts.most_common()]
    entries = checkpoint.entries
    undone: Counter[str] = Counter()
    rounded: Counter[str] = Counter()
    for layer, names in linears:
        kinds = {entries[n].stored_as for n in names if not is_plain(entries[n].stored_as)}
        if kinds and id(layer) not in held:
            undone["/".join(sorted(kinds))] += 1
    for each in planned:
        kinds = {entry.stored_as for entry in each.entries if not is_plain(entry.stored_as)}
        if kinds and not each.kept:
            rounded["/".join(sorted(kinds))] += 1
    parts += [f"{count} dequantized ({kind})" for kind, count in undone.items()]
    parts += [f"{count} rounded again ({kind})" for kind, count in rounded.items()]
    if quant.asked is None and not undone:
        return ""  # all weights are kept as stored
    return f"layers: {', '.join(parts)}" if parts else ""


def name_of(planned: Sequence[PackedLayer]) -> str:
    """The scheme of most quantized layers; "" if none is quantized."""
    counts = Counter(each.scheme.name for each in planned)
    return counts.most_common(1)[0][0] if counts else ""
