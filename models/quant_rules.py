"""Decides which weights of a model are quantized, by which scheme, whether they can be sharded over the
ranks, and how many bytes they take. The loader and the memory estimate both use these rules. Free of
torch, so that a job can be refused before any rank is started.

The linear layers of attention, MLP and experts get the scheme that is asked for. The head gets int8,
since its errors go straight into the logits, unless the request is for the same scheme or a plain head.
The embedding is a lookup table and is not quantized. Norms and routers are never quantized: they are
small, and the result is sensitive to them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Protocol

from base.errors import InputError
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
_PANEL = 32  # rows that `kernels.quant_linear` packs together; the last panel is padded


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
    """The weights of one matmul, by name, which are held quantized by `scheme`. `kept`: the file stores
    them so, and they are not rounded."""

    names: tuple[str, ...]
    scheme: Scheme
    kept: bool


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


def held_quantized(
    config: ModelConfig,
    matmuls: Sequence[tuple[str, ...]],
    stored: Mapping[str, StoredAs],
    asked: Asked | None,
    world_size: int,
) -> list[Held]:
    """The matmuls among `matmuls` that hold quantized weights: those that stay as the file `stored`
    them and, if schemes are `asked` for, those that are rounded to them. A matmul has one scheme: where
    a file mixes schemes, its weights are dequantized. So is a head that is asked to be plain."""
    shapes = expected_shapes(config)
    file_is_plain = all(is_plain(stored[name].stored_as) for names in matmuls for name in names)
    held = []
    for names in matmuls:
        wanted = None if asked is None else matmul_scheme(names, asked)
        if asked is not None and wanted is None:
            continue
        parts = [stored[name] for name in names]
        schemes = {part.scheme for part in parts}
        own = schemes.pop() if len(schemes) == 1 else None
        if own is not None and not can_cut(config, names[0], shapes[names[0]], own, world_size):
            own = None
        # In a file that is quantized, its quantized weights may be rounded to 8 bits, which loses
        # little. Weights that the file left plain stay plain.
        some = not all(is_plain(part.stored_as) for part in parts)
        if own is not None:
            held.append(Held(names, own, True))
        elif wanted is not None and (file_is_plain or (wanted.bits == 8 and some)):
            held.append(Held(names, wanted, False))
    return held


def scheme_for(name: str, asked: Asked) -> Scheme | None:
    """The scheme that a weight is quantized to if `asked` is asked for; None: it stays plain."""
    return asked.head if name == HEAD else asked.layers if is_linear(name) else None


def matmul_scheme(names: tuple[str, ...], asked: Asked) -> Scheme | None:
    """As `scheme_for`, for one of `matmuls_of`. The embedding there stands for the tied head."""
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
    head that is held quantized is a separate copy, in addition to the plain embedding."""
    shapes = expected_shapes(config) if held else {}
    total = sum(
        kind.count * prod(_sizes(kind.name, kind.shape, layout)) * item for kind in weight_kinds(config)
    )
    alike = Counter((_without_numbers(each.names[0]), each.scheme) for each in held)
    samples = {(_without_numbers(each.names[0]), each.scheme): each for each in held}
    for (name, scheme), count in alike.items():
        names = samples[name, scheme].names
        sizes = [_sizes(each, shapes[each], layout) for each in names]
        stacked = config.num_experts if ".experts." in names[0] else 1  # experts are packed separately
        rows = sum(each[0] for each in sizes) // stacked
        total += count * stacked * _packed_bytes(rows, names[0], shapes, scheme, layout)
        if names != (EMBEDDING,):
            total -= count * sum(map(prod, sizes)) * item
    return total


def _sizes(name: str, shape: tuple[int, ...], layout: Layout) -> list[int]:
    """The shape of one rank's part. Vocabularies are padded to whole blocks."""
    if find_spec(name).axis == "vocab":
        return [layout.vocab_block, *shape[1:]]
    return [part.stop - part.start for part in slices_of(name, shape, layout)]


def _packed_bytes(
    rows: int, name: str, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme, layout: Layout
) -> int:
    """The bytes of `rows` rows of a matmul, packed in whole panels, with the columns of one rank."""
    columns = slices_of(name, shapes[name], layout)[1]
    return scheme.nbytes(-(-rows // _PANEL) * _PANEL, columns.stop - columns.start)


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".", name)
