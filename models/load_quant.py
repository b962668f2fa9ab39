"""Reads the weights of layers that hold them quantized (`models.quant_rules` decides which do).

With `quant` None all quantized weights are dequantized. Else the schemes that the matmuls support are
kept, and plain weights are rounded as they are read, if that is asked for (`models.quant_rules.Quant`).
A layer of fused weights is one matmul over parts, each in its own form: neighbors with the same scheme
are joined, and a plain weight beside quantized ones is a part in bfloat16.

Shard first, pack last: a rank reads its part of each weight in the logical form (weights.quant), with
the same bits at any world size, and then packs it. Rounding works on whole rows or groups, before the
columns are sharded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from base.errors import InputError
from models.config import EMBEDDING, HEAD, ModelConfig
from models.mlp import ExpertStack
from models.quant_rules import (
    Asked,
    Held,
    Quant,
    check_cuts,
    check_quant,
    held_quantized,
    kept_scheme,
    matmul_scheme,
    matmuls_of,
)
from tp.layers import Linear, VocabEmbedding
from weights.checkpoint import Checkpoint, Entry, Slices
from weights.quant import QuantWeight, join_rows
from weights.quantize import quantize_rtn
from weights.schemes import GGUF_SCHEMES, Scheme, is_plain

BLOCK_BYTES = 32 << 20  # bytes of a plain weight in float32 that are rounded at once
PLAIN_BYTES = 8 << 20  # bytes of float32 read at once, for weights that must be converted


Holder = Linear | VocabEmbedding | ExpertStack


@dataclass(frozen=True)
class PackedLayer:
    """A layer that will hold quantized weights (`held`), with the entries of all its weights."""

    layer: Holder
    held: Held
    entries: tuple[Entry, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.held.names

    def nbytes(self, slices: Sequence[Slices]) -> int:
        """The bytes of parts of its weights, without padding."""
        sizes = [[part.stop - part.start for part in each] for each in slices]
        pairs = zip(self.held.schemes, sizes, strict=True)
        return sum(2 * prod(size) if own is None else own.nbytes(*size) for own, size in pairs)

    def read_bytes(self, slices: Sequence[Slices]) -> int:
        """About so many bytes of files are read for these parts."""
        return sum(
            (own.nbytes if own is not None and kept else _float32)(*(p.stop - p.start for p in each))
            for own, kept, each in zip(self.held.schemes, self.held.kept, slices, strict=True)
        )


def _float32(rows: int, columns: int) -> int:
    return 4 * rows * columns


def plan_layers(
    config: ModelConfig,
    checkpoint: Checkpoint,
    linears: Sequence[tuple[Holder, tuple[str, ...]]],
    quant: Quant | None,
    world_size: int,
    on_gpu: bool = False,
) -> list[PackedLayer]:
    """Those of `linears` (layers with the names of their weights) that will hold quantized weights.
    Raises InputError if the file or the model does not allow `quant`, or cannot be cut for so many
    ranks."""
    if quant is None:
        return []
    asked, entries = quant.asked, checkpoint.entries
    if asked is not None:
        check_quant(config, asked, world_size)
        for names in matmuls_of(config):
            _check_asked(checkpoint, names, asked, on_gpu)
    held = held_quantized(config, entries, asked, on_gpu)
    check_cuts(config, held, world_size)
    layers = {names: layer for layer, names in linears}
    return [
        PackedLayer(layers[each.names], each, tuple(entries[name] for name in each.names))
        for each in held
    ]


def _check_asked(
    checkpoint: Checkpoint, names: tuple[str, ...], asked: Asked, on_gpu: bool = False
) -> None:
    """Raise InputError where a scheme is asked for, and the file has another with fewer bits, which
    quant=auto keeps: rounding it would cost bits and memory. Weights of 8 bits are kept if 8 bits are
    asked for. Those that can only be dequantized may be rounded to 8 bits, which loses little. A head
    with fewer bits is kept if 8 bits are asked for."""
    wanted = matmul_scheme(names, asked)
    is_head = names[0] in (HEAD, EMBEDDING)
    for part in (checkpoint.entries[name] for name in names):
        own = kept_scheme(part, part.shape[-1], on_gpu)
        if wanted is None or is_plain(part.stored_as) or own == wanted:
            continue
        if wanted.bits == 8 and (is_head or own is None or own.bits == 8):
            continue
        kept = own is not None and own.name != part.stored_as
        has = f"{own.name} ({part.stored_as})" if own is not None and kept else part.stored_as
        raise InputError(
            f"{asked.words}: {checkpoint.path} is quantized already, {names[0]} as {has}; use "
            "quant=auto, which keeps that, or a file that is not quantized"
        )


def read_layer(planned: PackedLayer, slices: Sequence[Slices]) -> list[QuantWeight | Tensor]:
    """This rank's part of a layer: each of its weights, cut to its slices, quantized or plain
    (bfloat16); neighbors with the same scheme are joined along the rows."""
    return _read(planned, 0, slices)


def read_experts(
    planned: PackedLayer, slices: Sequence[Slices], on_expert: Callable[[], None] = lambda: None
) -> Iterator[list[QuantWeight | Tensor]]:
    """As `read_layer`, for each expert of a stack in turn; `on_expert` is called after each expert."""
    assert isinstance(planned.layer, ExpertStack)
    size = len(planned.entries) // planned.layer.num_experts
    for i in range(0, len(planned.entries), size):
        yield _read(planned, i, slices[i : i + size])
        on_expert()


def _read(planned: PackedLayer, first: int, slices: Sequence[Slices]) -> list[QuantWeight | Tensor]:
    """The weights from number `first` on, as many as there are `slices`."""
    found: list[QuantWeight | Tensor] = []
    numbers = range(first, first + len(slices))
    for scheme, run in groupby(numbers, key=lambda i: planned.held.schemes[i]):
        parts = [(i, planned.entries[i], slices[i - first]) for i in run]
        if scheme is None:
            found.append(torch.cat([read_plain(entry, part) for _, entry, part in parts]))
            continue
        quantized = []
        for i, entry, part in parts:
            if planned.held.kept[i]:
                assert entry.quant is not None
                quantized.append(entry.quant(*part))
            else:
                quantized.append(read_rounded(entry, part, scheme))
        found.append(join_rows(quantized))
    return found


def read_plain(entry: Entry, slices: Slices) -> Tensor:
    """A part of a weight in bfloat16, dequantized if need be."""
    sizes = [part.stop - part.start for part in slices]
    found = torch.empty(sizes, dtype=torch.bfloat16)
    for first, part in blocks_of(entry, slices):
        found[first : first + part.shape[0]] = part
    return found


def blocks_of(entry: Entry, slices: Slices) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, part) of an entry's slice: all of it, in place, if no conversion is needed;
    else blocks of rows, since allocating memory for all of it would take longer than converting it."""
    if entry.peek is not None:
        yield 0, entry.peek(slices)
        return
    rows, *others = slices
    row_bytes = 4 * prod(part.stop - part.start for part in others)
    size = max(1, PLAIN_BYTES // max(row_bytes, 1))
    for start in range(rows.start, rows.stop, size):
        block = slice(start, min(start + size, rows.stop))
        yield start - rows.start, entry.read((block, *others))


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
    """One line for the user on how the weights are held: the layers of each form; a layer of several is
    counted under all of their names. "" if all are kept as stored in one form, or if all are
    dequantized (`quant` None)."""
    if quant is None:
        return ""
    entries = checkpoint.entries
    counts = Counter("+".join(dict.fromkeys(_forms(each))) for each in planned)
    parts = [f"{count} of {name}" for name, count in counts.most_common()]
    held = {
        name: (scheme, kept)
        for each in planned
        for name, scheme, kept in zip(each.names, each.held.schemes, each.held.kept, strict=True)
    }
    undone: Counter[str] = Counter()
    rounded: Counter[str] = Counter()
    for _, names in linears:
        for counter, wanted in ((undone, None), (rounded, True)):
            kinds = {
                entries[name].stored_as
                for name in names
                if not is_plain(entries[name].stored_as)
                for scheme, kept in [held.get(name, (None, False))]
                if not kept and (scheme is not None) == bool(wanted)
            }
            if kinds:
                counter["/".join(sorted(kinds))] += 1
    parts += [f"{count} dequantized ({kind})" for kind, count in undone.items()]
    parts += [f"{count} rounded again ({kind})" for kind, count in rounded.items()]
    if quant.asked is None and not undone and len(counts) < 2:
        return ""
    return f"layers: {', '.join(parts)}" if parts else ""


def _forms(planned: PackedLayer) -> list[str]:
    """The form of each weight, by the name that people know it by: that of GGUF's blocks, or of the
    scheme."""
    held = planned.held
    return [
        "bf16" if scheme is None
        else entry.stored_as if kept and entry.stored_as in GGUF_SCHEMES
        else scheme.name
        for scheme, kept, entry in zip(held.schemes, held.kept, planned.entries, strict=True)
    ]  # fmt: skip


def name_of(planned: Sequence[PackedLayer]) -> str:
    """The form of most quantized layers; "" if none is quantized."""
    forms = [[form for form in _forms(each) if form != "bf16"] for each in planned]
    counts = Counter(Counter(each).most_common(1)[0][0] for each in forms)
    return counts.most_common(1)[0][0] if counts else ""
