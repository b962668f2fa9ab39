"""Filling the layers of a model that hold their weights quantized (`models.quant_rules` decides which).

`quant` is "none" (dequantize what is quantized), "auto" (keep what products can take) or what
`models.quant_rules.parse_asked` reads, a scheme with or without the head's: plain weights are rounded
to it as they are read. A layer of fused weights is one product, so its parts must have one scheme;
where a file mixes them (GGUF's K-quants beside others) the layer is dequantized.

Shard first, pack last: a rank reads its part of each weight in the logical form (weights.quant), the
same bits at any world size, and lays out what it holds. Rounding takes whole rows or groups, before
columns are cut.
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
    check_quant,
    held_quantized,
    parse_asked,
    product_scheme,
)
from tp.layers import Linear
from weights import schemes
from weights.checkpoint import Checkpoint, Entry, Slices
from weights.quant import QuantWeight, join_rows
from weights.quantize import quantize_rtn
from weights.schemes import Scheme

BLOCK_BYTES = 32 << 20  # of a plain weight in float32, as it is being rounded


Holder = Linear | ExpertStack


@dataclass(frozen=True)
class PackedLayer:
    """A layer that is to hold its weights quantized: the entries of its parts and what they are read
    as. `kept`: as the file has them."""

    layer: Holder
    names: tuple[str, ...]
    entries: tuple[Entry, ...]
    scheme: Scheme
    kept: bool


def plan_layers(
    config: ModelConfig,
    checkpoint: Checkpoint,
    linears: Sequence[tuple[Holder, tuple[str, ...]]],
    quant: str,
    world_size: int,
) -> list[PackedLayer]:
    """The layers, of `linears` with the names of their weights, that hold them quantized. Raises
    InputError where the file or the model does not go with `quant`."""
    if quant == "none":
        return []
    asked = None if quant == "auto" else parse_asked(quant)
    if asked is not None:
        check_quant(config, asked, world_size)
    entries = checkpoint.entries
    layers = {names: layer for layer, names in linears}
    if asked is not None:
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


def is_plain(entry: Entry) -> bool:
    """Whether an entry's numbers are stored as such."""
    return schemes.is_plain(entry.stored_as)


def _check_asked(checkpoint: Checkpoint, names: tuple[str, ...], asked: Asked) -> None:
    """Raise InputError where weights would be rounded a second time with a loss. Those of 8 bits and
    GGUF's finer formats lose little by 8 bits; a head of 4 bits is kept where 8 are asked for."""
    wanted = product_scheme(names, asked)
    is_head = names[0] in (HEAD, EMBEDDING)
    for part in (checkpoint.entries[name] for name in names):
        if wanted is None or is_plain(part) or part.scheme == wanted:
            continue
        if wanted.bits == 8 and (is_head or part.scheme is None or part.scheme.bits == 8):
            continue
        has = part.stored_as if part.scheme is None else f"{part.scheme.name} ({part.stored_as})"
        raise InputError(
            f"{asked.words}: {checkpoint.path} is quantized already, {names[0]} as {has}; use "
            "quant=auto, which keeps that, or a file that is not quantized"
        )


def read_layer(planned: PackedLayer, slices: Sequence[Slices]) -> QuantWeight:
    """This rank's part of a layer: of each of its weights the part that its slices say."""
    return _read(planned, planned.entries, slices)


def read_experts(
    planned: PackedLayer, slices: Sequence[Slices], told: Callable[[], None] = lambda: None
) -> Iterator[QuantWeight]:
    """The same of each expert in a stack of them, one after the other; `told` is called after each."""
    assert isinstance(planned.layer, ExpertStack)
    size = len(planned.entries) // planned.layer.num_experts
    for i in range(0, len(planned.entries), size):
        yield _read(planned, planned.entries[i : i + size], slices[i : i + size])
        told()


def _read(planned: PackedLayer, entries: Sequence[Entry], slices: Sequence[Slices]) -> QuantWeight:
    return join_rows(
        [
            entry.quant(*part) if planned.kept and entry.quant is not None
            else read_rounded(entry, part, planned.scheme)
            for entry, part in zip(entries, slices, strict=True)
        ]
    )  # fmt: skip


def read_rounded(entry: Entry, slices: Slices, scheme: Scheme) -> QuantWeight:
    """A part of a weight, rounded to a scheme in blocks of rows. Scales are the whole weight's."""
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
    if not found:  # the last ranks may hold nothing of a small vocabulary
        found = [quantize_rtn(torch.zeros(1, right - left), scheme).rows(0, 0)]
    return join_rows(found)


def summary(planned: Sequence[PackedLayer], linears: Sequence[tuple[Holder, tuple[str, ...]]],
            checkpoint: Checkpoint, quant: str) -> str:  # fmt: skip
    """What became of the weights, in a line; "" where they are as they were."""
    held = {id(each.layer) for each in planned}
    counts = Counter(each.scheme.name for each in planned)
    told = [f"{count} of {name}" for name, count in counts.most_common()]
    entries = checkpoint.entries
    undone: Counter[str] = Counter()
    rounded: Counter[str] = Counter()
    for layer, names in linears:
        kinds = {entries[n].stored_as for n in names if not is_plain(entries[n])}
        if kinds and id(layer) not in held:
            undone["/".join(sorted(kinds))] += 1
    for each in planned:
        kinds = {entry.stored_as for entry in each.entries if not is_plain(entry)}
        if kinds and not each.kept:
            rounded["/".join(sorted(kinds))] += 1
    told += [f"{count} dequantized ({kind})" for kind, count in undone.items()]
    told += [f"{count} rounded again ({kind})" for kind, count in rounded.items()]
    if quant == "auto" and not undone:
        return ""  # all is kept as it was
    return f"layers: {', '.join(told)}" if told else ""


def name_of(planned: Sequence[PackedLayer]) -> str:
    """The scheme that most layers have; "" where none is quantized."""
    counts = Counter(each.scheme.name for each in planned)
    return counts.most_common(1)[0][0] if counts else ""
