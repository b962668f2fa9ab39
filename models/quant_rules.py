"""Decides which weights of a model are quantized, by which scheme, whether they can be sharded over the
ranks, and how many bytes they take. The loader and the memory estimate both use these rules. Free of
torch, so that a job can be refused before any rank is started.

The linear layers of attention, MLP and experts get the scheme that is asked for. The head gets int8,
since its errors go straight into the logits, unless the request is for the same scheme or a plain head.
Norms and routers are never quantized: they are small, and the result is sensitive to them.

What a file has quantized stays in its own form, the embedding table too. Weights that are fused into
one matmul may have different forms: each keeps its own, and plain ones among them stay plain. A table
that the file has plain is never rounded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from math import prod
from typing import Any, Protocol

from base.errors import InputError
from kernels.sizes import packed_bytes
from models.config import EMBEDDING, HEAD, ModelConfig, expected_shapes
from models.sizes import layout_of, weight_kinds
from tp.shard import Layout, find_spec, slices_of
from weights.schemes import HEADS, MIN_GROUP, SCHEMES, Scheme, is_plain, parse_scheme

HEAD_SCHEME = Scheme(8, 0)  # the head's default
_LINEAR = re.compile(
    r"(model\.layers\.\d+\.)"
    r"(?:self_attn\.([qkvo])|mlp\.(gate|up|down)|mlp\.(experts)\.\d+\.(gate|up|down))_proj\.weight"
)
# Weights that are multiplied with the same input are fused into one matmul.
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_MOST_RANKS = 64  # the largest number of ranks that a message suggests
# What kernels.quant_cuda packs.
_GPU_CODES = ("i8", "i4", "u4")


class StoredAs(Protocol):
    """What `weights.checkpoint.Entry` and `weights.outline.StoredWeight` both say about a weight."""

    @property
    def stored_as(self) -> str: ...
    @property
    def scheme(self) -> Scheme | None: ...


@dataclass(frozen=True)
class Asked:
    """The schemes that plain weights will be rounded to: the layers', and the head's (None: it stays
    plain)."""

    layers: Scheme
    head: Scheme | None = HEAD_SCHEME

    @property
    def words(self) -> str:
        """The command-line keys that ask for this, for messages."""
        words = f"quant={self.layers.name}"
        if self.head == HEAD_SCHEME:
            return words
        return f"{words} quant_head={'none' if self.head is None else 'same'}"


@dataclass(frozen=True)
class Quant:
    """How a model holds quantized weights, if it does not dequantize all: those that its file has
    quantized stay so, and plain ones are rounded to the schemes `asked` for (None: they stay plain).
    `round_prompts` is as in `tp.layers.hold_quantized`."""

    asked: Asked | None = None
    round_prompts: bool = False


def ask(layers: str, head: str = HEADS[0]) -> Asked:
    """The schemes that the name of a scheme and one of `HEADS` ask for. Raises InputError."""
    scheme = parse_scheme(layers)
    heads = dict(zip(HEADS, (HEAD_SCHEME, scheme, None), strict=True))
    if head not in heads:
        raise InputError(f"quant_head={head}: must be one of {', '.join(HEADS)}")
    return Asked(scheme, heads[head])


def parse_asked(text: str) -> Asked:
    """`ask` of one word: "int4-g32", "int4-g32/same". Raises InputError."""
    layers, slash, head = text.partition("/")
    return ask(layers, head) if slash else ask(layers)


def parse_quant(text: str) -> Quant | None:
    """As `parse_asked`; also "auto" (what the file has quantized stays so) and "none" (None: all is
    dequantized)."""
    if text == "none":
        return None
    return Quant(None if text == "auto" else parse_asked(text))


def quant_from_dict(data: Mapping[str, Any]) -> Quant:
    """The inverse of `dataclasses.asdict`."""
    asked = data["asked"]
    if asked is not None:
        head = asked["head"]
        asked = Asked(Scheme(**asked["layers"]), None if head is None else Scheme(**head))
    return Quant(asked, data["round_prompts"])


@dataclass(frozen=True)
class Held:
    """The weights of one layer, by name, at least one of which is held quantized. For each: its scheme
    (None: it stays plain), and whether it is `kept`, that is, the file stores it so and it is not
    rounded. `table`: rows are looked up in it, too (an embedding, or a head that is tied to it)."""

    names: tuple[str, ...]
    schemes: tuple[Scheme | None, ...]
    kept: tuple[bool, ...]
    table: bool = False


def is_linear(name: str) -> bool:
    """Whether a weight is one of the linear layers of attention, MLP or experts."""
    return _LINEAR.fullmatch(name) is not None


@cache
def matmuls_of(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """The matmuls of a model that may be quantized, each as the names of its weights: several names if
    weights are fused, and those of all experts of a layer, which form one stack. A tied head has the
    embedding's name."""
    found: dict[tuple[str | None, ...], list[str]] = {}
    for name in expected_shapes(config):
        match = _LINEAR.fullmatch(name)
        if match is not None:
            layer, attention, mlp, experts, expert = match.groups()
            part = attention or mlp or expert
            found.setdefault((layer, experts, _FUSED.get(part, part)), []).append(name)
    return (*map(tuple, found.values()), (EMBEDDING if config.tie_embeddings else HEAD,))


def layers_of(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """The layers that may hold quantized weights: `matmuls_of`, and an embedding that is not tied."""
    return (*matmuls_of(config), *(() if config.tie_embeddings else ((EMBEDDING,),)))


def held_quantized(
    config: ModelConfig, stored: Mapping[str, StoredAs], asked: Asked | None, on_gpu: bool = False
) -> list[Held]:
    """The layers that hold quantized weights: those that stay as the file `stored` them and, if schemes
    are `asked` for, those that are rounded to them. A head that is asked to be plain is dequantized.

    All experts of a layer have the same schemes: where a file's differ, they are dequantized. With
    `on_gpu` all weights of a layer have the same, of integers, and no rows are looked up in them."""
    shapes = expected_shapes(config)
    matmuls = matmuls_of(config)
    file_is_plain = all(is_plain(stored[name].stored_as) for names in matmuls for name in names)
    held = []
    for names in layers_of(config):
        table = names == (EMBEDDING,)
        is_matmul = config.tie_embeddings or not table
        wanted = matmul_scheme(names, asked) if is_matmul and asked is not None else None
        if (is_matmul and asked is not None and wanted is None) or (on_gpu and not is_matmul):
            continue
        own = [kept_scheme(stored[name], shapes[name][1], on_gpu) for name in names]
        size = config.num_experts if ".experts." in names[0] else 1
        alike = 1 if on_gpu else len(names) // size
        if own != own[:alike] * (len(names) // alike):
            own = [None] * len(names)
        # In a file that is quantized, its quantized weights may be rounded to 8 bits, which loses
        # little. Weights that the file left plain stay plain.
        rounded = [
            wanted if file_is_plain or (wanted and wanted.bits == 8 and not is_plain(part.stored_as))
            else None
            for part in (stored[name] for name in names)
        ]  # fmt: skip
        if rounded != rounded[:alike] * (len(names) // alike):
            rounded = [None] * len(names)
        schemes = tuple(one or other for one, other in zip(own, rounded, strict=True))
        if any(schemes):
            kept = tuple(each is not None for each in own)
            held.append(Held(names, schemes, kept, table and all(kept) and not on_gpu))
    return held


def kept_scheme(part: StoredAs, columns: int, on_gpu: bool = False) -> Scheme | None:
    """The scheme in which a weight of so many columns stays; None if the file has it plain, or if it
    can only be dequantized."""
    scheme = part.scheme
    if scheme is None or not scheme.can_cut(0, columns):
        return None
    fits = scheme.code_name in _GPU_CODES and not scheme.super_scales
    return None if on_gpu and not fits else scheme


def check_cuts(config: ModelConfig, held: Collection[Held], world_size: int) -> None:
    """Raise InputError if some of `world_size` ranks would hold a part of a group of a weight that is
    kept as the file has it."""
    shapes = expected_shapes(config)
    kinds = {
        (_without_numbers(name), scheme): name
        for each in held
        for name, scheme, kept in zip(each.names, each.schemes, each.kept, strict=True)
        if kept
    }

    def fits(name: str, scheme: Scheme | None, size: int) -> bool:
        return scheme is None or can_cut(config, name, shapes[name], scheme, size)

    for (_, scheme), name in kinds.items():
        if scheme is None or fits(name, scheme, world_size):
            continue
        others = [n for n in range(1, min(config.num_heads, _MOST_RANKS) + 1) if n != world_size]
        fitting = ", ".join(
            str(n) for n in others if all(fits(one, own, n) for (_, own), one in kinds.items())
        )
        raise InputError(
            f"{name} is stored as {scheme.name}, of which {world_size} ranks would cut groups of "
            f"{scheme.unit} columns; use --ranks N with N of {fitting}, or quant=none, which "
            "dequantizes all weights"
        )


def scheme_for(name: str, asked: Asked) -> Scheme | None:
    """The scheme that a weight is quantized to if `asked` is asked for; None: it stays plain."""
    return asked.head if name == HEAD else asked.layers if is_linear(name) else None


def matmul_scheme(names: tuple[str, ...], asked: Asked) -> Scheme | None:
    """As `scheme_for`, for one of `matmuls_of`, where the embedding stands for the tied head."""
    return scheme_for(HEAD if names == (EMBEDDING,) else names[0], asked)


def can_cut(config: ModelConfig, name: str, shape: tuple[int, ...], scheme: Scheme, size: int) -> bool:
    """Whether each of `size` ranks' columns of a weight quantized by `scheme` are whole groups."""
    return all(
        scheme.can_cut(columns.start, columns.stop)
        for rank in range(size)
        for columns in [slices_of(name, shape, layout_of(config, rank, size))[1]]
    )


def check_quant(config: ModelConfig, asked: Asked, world_size: int) -> None:
    """Raise InputError if a model cannot be quantized as `asked` over `world_size` ranks."""
    shapes = {kind.name: kind.shape for kind in weight_kinds(config)}
    shapes[HEAD] = (config.vocab_size, config.dim)  # a tied head is quantized too
    kinds = [
        (name, shape, scheme)
        for name, shape in shapes.items()
        if (scheme := scheme_for(name, asked)) is not None
    ]
    for name, shape, scheme in kinds:
        if shape[1] % (scheme.group_size or MIN_GROUP):
            fitting = ", ".join(s for s in SCHEMES if shape[1] % _group(s) == 0)
            raise InputError(
                f"{asked.words}: {name} has rows of {shape[1]}, which are not whole groups of "
                f"{scheme.group_size or MIN_GROUP}; use "
                + (f"one of {fitting}" if fitting else "quant=none")
            )

    def fits(size: int) -> bool:
        return all(can_cut(config, name, shape, scheme, size) for name, shape, scheme in kinds)

    if not fits(world_size):
        others = [n for n in range(1, min(config.num_heads, _MOST_RANKS) + 1) if n != world_size]
        fitting = ", ".join(str(n) for n in others if fits(n))
        raise InputError(
            f"{asked.words}: with {world_size} ranks some hold columns that are not whole groups "
            f"of {MIN_GROUP}; use --ranks N with N of {fitting}, or quant=none"
        )


def _group(name: str) -> int:
    found = re.search(r"-g(\d+)", name)
    return int(found[1]) if found else MIN_GROUP


def weight_bytes(config: ModelConfig, layout: Layout, item: int, held: Collection[Held] = ()) -> int:
    """The bytes of one rank's weights: `item` bytes a number, except for those `held` quantized. A tied
    head that is rounded is a copy, in addition to the plain embedding."""
    shapes = expected_shapes(config) if held else {}
    total = sum(
        kind.count * prod(_sizes(kind.name, kind.shape, layout)) * item for kind in weight_kinds(config)
    )
    alike: Counter[tuple[str, tuple[Scheme | None, ...], bool]] = Counter()
    samples: dict[tuple[str, tuple[Scheme | None, ...], bool], tuple[str, ...]] = {}
    for each in held:
        stacked = config.num_experts if ".experts." in each.names[0] else 1  # each packed separately
        one = len(each.names) // stacked
        key = _without_numbers(each.names[0]), each.schemes[:one], each.table
        alike[key] += stacked
        samples[key] = each.names[:one]
    for key, count in alike.items():
        names, (_, schemes, table) = samples[key], key
        sizes = [_sizes(name, shapes[name], layout) for name in names]
        columns, width = slices_of(names[0], shapes[names[0]], layout)[1], shapes[names[0]][1]
        for scheme, run in groupby(zip(schemes, sizes, strict=True), key=lambda pair: pair[0]):
            rows = sum(size[0] for _, size in run)
            total += count * packed_bytes(scheme, rows, columns.start, columns.stop, width)
        if names != (EMBEDDING,) or table:
            total -= count * sum(map(prod, sizes)) * item
    return total


def _sizes(name: str, shape: tuple[int, ...], layout: Layout) -> list[int]:
    """The shape of one rank's part. Vocabularies are padded to whole blocks."""
    if find_spec(name).axis == "vocab":
        return [layout.vocab_block, *shape[1:]]
    return [part.stop - part.start for part in slices_of(name, shape, layout)]


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".", name)
