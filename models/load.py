"""Loads this rank's part of a model from a checkpoint: check the names, then stream the slices.

The model is built on the meta device, given memory, and filled tensor by tensor, so a rank never holds
more than its own part and the slice being read. Weights are packed for the matmuls as they are read:
bfloat16 weights (`tp.layers.hold_packed`) and quantized ones, which `models.load_quant` reads. A
missing, unknown or mis-shaped weight is an error that names it: a tensor left uninitialized would make
the results wrong without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from base.errors import InputError
from comm.group import Group
from kernels.packed import PackedRows
from models.config import EMBEDDING, HEAD, ModelConfig, expected_shapes
from models.config_gguf import from_gguf
from models.config_hf import from_hf
from models.decoder import Decoder
from models.load_quant import (
    Holder,
    PackedLayer,
    blocks_of,
    name_of,
    plan_layers,
    read_experts,
    read_layer,
    summary,
)
from models.mlp import Experts, ExpertStack
from models.quant_rules import Quant, is_linear
from models.tying import settle_head
from tp.layers import (
    ColumnLinear,
    Linear,
    RowLinear,
    VocabEmbedding,
    can_pack,
    hold_packed,
    hold_quantized,
    packed_parts,
    share_packed,
)
from tp.shard import Layout, find_spec, slices_of
from weights.checkpoint import Checkpoint, Entry, Slices
from weights.pages import release_pages
from weights.quant import QuantWeight
from weights.schemes import is_plain

RELEASE_BYTES = 64 << 20  # bytes of a file's pages that may be resident while it is read


def config_of(
    checkpoint: Checkpoint,
    group: Group | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ModelConfig:
    """The dimensions from a checkpoint's own metadata, and whether its head is tied to the embedding.
    All ranks of `group` must call this. `say` is called with a line if the config declares a tie but
    the stored head differs from the embedding. Raises InputError."""
    source = str(checkpoint.path)
    if checkpoint.format == "gguf":
        return from_gguf(checkpoint.config, checkpoint.entries, source)
    return settle_head(from_hf(checkpoint.config, source), checkpoint, group or Group(0, 1), say)


def load_model(
    config: ModelConfig,
    checkpoint: Checkpoint,
    group: Group,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: torch.device | str = "cpu",
    quant: Quant | None = None,
) -> Decoder:
    """Build this rank's part of the model on `device` and fill it.

    `progress` is called with the bytes filled so far and in total. `quant` is as in
    `models.load_quant`. Raises InputError.
    """
    shapes = expected_shapes(config)
    check_names(checkpoint, shapes, config.tie_embeddings)
    with torch.device("meta"):
        model = Decoder(config, group)
    linears = list(linears_of(model))
    on_gpu = torch.device(device).type == "cuda"
    planned = plan_layers(config, checkpoint, linears, quant, group.size, on_gpu)
    _allocate(model, linears, planned, dtype, device)
    targets: dict[str, Tensor | PackedRows] = {**destinations(model)}
    targets.update(_packed_destinations(model, linears))
    names = targets.keys() | {name for each in planned for name in each.names}
    assert names == shapes.keys(), names ^ shapes.keys()
    total = sum(target.nbytes for target in targets.values())
    total += sum(each.nbytes(_slices(each, model.layout)) for each in planned)
    count = _counting(checkpoint, total, progress)
    _fill_quantized(model, planned, device, quant is not None and quant.round_prompts, count)
    _fill_plain(model, checkpoint, targets, count)
    model.quantized = name_of(planned)
    model.about_quant = summary(planned, linears, checkpoint, quant)
    return model.eval()


def _allocate(
    model: Decoder,
    linears: Sequence[tuple[Holder, tuple[str, ...]]],
    planned: Sequence[PackedLayer],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Give a model on the meta device its memory on `device`, except for the weights that will be held
    quantized as `planned`. Of `linears`, those that are faster packed get their packed form."""
    for each in planned:
        each.layer.weight = None  # type: ignore[assignment]
        if each.held.table:
            model.embed.weight = None  # type: ignore[assignment]
    model.to(dtype)
    model.embed.dtype = dtype
    for layer, _ in linears:
        if not isinstance(layer, ExpertStack | VocabEmbedding) and can_pack(layer, device):
            hold_packed(layer)
    tied = model.config.tie_embeddings
    if tied and model.head.packing is not None:
        model.embed.weight = None  # type: ignore[assignment]
    model.to_empty(device=device)
    if tied and model.head.packing is not None:
        share_packed(model.embed, model.head)
    elif tied and model.head.weight is not None:
        model.head.weight = model.embed.weight  # to_empty gave each its own memory
    # Zero the rows of the last ranks' vocabulary blocks that are past the end of the vocabulary.
    used = model.layout.vocab_stop - model.layout.vocab_start
    for padded in (model.embed.weight, model.head.weight, model.head.bias):
        if padded is not None:
            padded[used:].zero_()


Count = Callable[[int, int], None]


def _counting(checkpoint: Checkpoint, total: int, progress: Callable[[int, int], None]) -> Count:
    """Returns a function that reports progress: `filled` more bytes of the model, for which `read`
    bytes of files were read. It releases pages of the files: they stay in the page cache, but not in
    this process's memory."""
    done = unreleased = 0

    def count(filled: int, read: int) -> None:
        nonlocal done, unreleased
        done, unreleased = done + filled, unreleased + read
        if unreleased >= RELEASE_BYTES:
            release_pages(checkpoint.files)
            unreleased = 0
        progress(done, total)

    return count


def _slices(each: PackedLayer, layout: Layout) -> list[Slices]:
    """This rank's part of each of a layer's weights."""
    pairs = zip(each.names, each.entries, strict=True)
    return [slices_of(name, entry.shape, layout) for name, entry in pairs]


def _fill_quantized(
    model: Decoder,
    planned: Sequence[PackedLayer],
    device: torch.device | str,
    round_prompts: bool,
    count: Count,
) -> None:
    """Read this rank's part of each of the layers `planned`, and pack it."""
    for each in planned:
        slices = _slices(each, model.layout)
        filled, read = each.nbytes(slices), each.read_bytes(slices)
        if isinstance(each.layer, ExpertStack):
            size = each.layer.num_experts
            on_expert = partial(count, filled // size, read // size)
            each.layer.hold_quantized(read_experts(each, slices, on_expert), device, round_prompts)
            continue
        weights = read_layer(each, slices)
        if each.layer in (model.head, model.embed):
            (weight,) = weights
            assert isinstance(weight, QuantWeight)
            weights = [weight.padded(model.layout.vocab_block)]
        hold_quantized(each.layer, weights, device, round_prompts)
        if each.held.table and each.layer is model.head:
            share_packed(model.embed, model.head)
        count(filled, read)


def _fill_plain(
    model: Decoder, checkpoint: Checkpoint, targets: Mapping[str, Tensor | PackedRows], count: Count
) -> None:
    """Copy this rank's slice of each of the other weights to its place."""
    for name, target in targets.items():
        if isinstance(target, Tensor) and find_spec(name).axis == "first" and model.group.rank:
            target.zero_()  # only rank 0 adds it
            count(target.nbytes, 0)
            continue
        entry = checkpoint.entries[name]
        for first, part in blocks_of(entry, slices_of(name, entry.shape, model.layout)):
            last = first + part.shape[0]
            if isinstance(target, PackedRows):
                room = target.rows(first, last)
                room.fill(part)
                count(room.nbytes, part.nbytes)
                continue
            rows = target[first:last]
            assert part.shape == rows.shape, (name, part.shape, target.shape)
            rows.copy_(part)
            count(rows.nbytes, part.nbytes)


def linears_of(model: Decoder) -> Iterator[tuple[Holder, tuple[str, ...]]]:
    """The layers that may hold quantized weights, with the canonical names of their weights."""
    for prefix, module, names in _modules(model):
        weights = tuple(f"{prefix}{name}.weight" for name in names)
        if isinstance(module, ColumnLinear | RowLinear) and is_linear(weights[0]):
            yield module, weights
    for prefix, experts in _experts_of(model):
        for stack, names in (
            (experts.gate_ups, ("gate_proj", "up_proj")),
            (experts.downs, ("down_proj",)),
        ):
            count = model.config.num_experts
            yield stack, tuple(f"{prefix}.{i}.{name}.weight" for i in range(count) for name in names)
    if model.config.tie_embeddings:
        yield model.head, (EMBEDDING,)
    else:
        yield from ((model.head, (HEAD,)), (model.embed, (EMBEDDING,)))


def check_names(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], tie_embeddings: bool
) -> None:
    """Raise InputError unless the checkpoint holds exactly these weights, in these shapes."""
    entries = checkpoint.entries
    unused = sorted(entries.keys() - shapes.keys())
    # Quantized files may have a bias of zeros for every layer (AutoGPTQ writes them).
    unused = [name for name in unused if not _is_zero_bias(name, entries)]
    if tie_embeddings and HEAD in unused:
        unused.remove(HEAD)  # a tied head that is stored nevertheless
    if unused:
        file = entries[unused[0]].file or checkpoint.path
        raise InputError(
            f"{checkpoint.path} holds {len(unused)} weights that this model does not have, "
            f"such as {unused[0]!r} in {file}"
        )
    missing = sorted(shapes.keys() - entries.keys())
    if missing == [HEAD] and HEAD not in checkpoint.absent:
        raise InputError(
            f"{checkpoint.path} holds no LM head ({HEAD}), and its config does not tie it to the "
            "embedding: a base model without a head makes no text; use the model with its head, or set "
            "tie_word_embeddings in config.json if the embedding is its head"
        )
    if missing:
        raise InputError(
            f"{checkpoint.path} lacks {len(missing)} weights of this model, such as "
            f"{missing_one(missing, checkpoint)}"
        )
    for name, shape in shapes.items():
        entry = entries[name]
        if entry.shape != shape:
            raise InputError(
                f"{entry.file or checkpoint.path}: {name} has shape {entry.shape}, but the model's "
                f"configuration asks for {shape}"
            )


def missing_one(missing: Sequence[str], checkpoint: Checkpoint) -> str:
    """For messages: one of the missing weights, and the reason if the files show one."""
    name = next((name for name in missing if name in checkpoint.absent), missing[0])
    reason = checkpoint.absent.get(name)
    return f"{name!r}" + (f" ({reason}; download the model again)" if reason else "")


def _is_zero_bias(name: str, entries: Mapping[str, Entry]) -> bool:
    weight, entry = entries.get(f"{name.removesuffix('bias')}weight"), entries[name]
    if (
        not name.endswith(".bias")
        or weight is None
        or is_plain(weight.stored_as)
        or len(entry.shape) != 1
    ):
        return False
    return not bool(entry.read((slice(0, entry.shape[0]),)).any())


# The canonical names of what a block's modules hold. Several names: weights fused along the outputs.
PARTS: dict[str, tuple[str, ...]] = {
    "norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "post_attention_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
    "mlp.router": ("mlp.gate",),
    "pre_mlp_norm": ("pre_feedforward_layernorm",),
    "post_mlp_norm": ("post_feedforward_layernorm",),
}
# `mlp_norm` has a different canonical name in each kind of block.
_MLP_NORM = {"llama": "post_attention_layernorm", "parallel": "mlp_layernorm"}


def _modules(model: Decoder) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """The modules of the blocks that hold weights, except experts: (prefix of the canonical names,
    module, the canonical names of its weights)."""
    for i, block in enumerate(model.layers):
        for path, module in block.named_modules():
            names = (_MLP_NORM[model.config.block],) if path == "mlp_norm" else PARTS.get(path, ())
            if names:
                yield f"model.layers.{i}.", module, names


def destinations(model: Decoder) -> dict[str, Tensor]:
    """The destination of each canonical weight's slice: views into the model's (fused) parameters."""
    used = model.layout.vocab_stop - model.layout.vocab_start
    targets: dict[str, Tensor] = {}
    if model.embed.weight is not None:
        targets[EMBEDDING] = model.embed.weight[:used]

    def put(prefix: str, module: nn.Module, names: tuple[str, ...]) -> None:
        """Add the parameters of a module; fused ones are split into their weights."""
        for kind, value in module.named_parameters(recurse=False):
            parts = value.split(module.parts) if len(names) > 1 else (value,)
            targets.update({f"{prefix}{n}.{kind}": p for n, p in zip(names, parts, strict=True)})

    for prefix, module, names in _modules(model):
        put(prefix, module, names)
    for prefix, experts in _experts_of(model):
        targets.update(_experts(prefix, experts))
    put("model.", model.norm, ("norm",))
    if not model.config.tie_embeddings:
        if model.head.weight is not None:
            targets[HEAD] = model.head.weight[:used]
        if model.head.bias is not None:
            targets["lm_head.bias"] = model.head.bias[:used]
    return targets


def _packed_destinations(
    model: Decoder, linears: Sequence[tuple[Holder, tuple[str, ...]]]
) -> dict[str, PackedRows]:
    """The same for the weights of `linears` that are held packed, in bfloat16."""
    targets: dict[str, PackedRows] = {}
    for layer, names in linears:
        if not isinstance(layer, ExpertStack | VocabEmbedding) and layer.packing is not None:
            parts = packed_parts(layer, _sizes(model, layer, names))
            targets.update(zip(names, parts, strict=True))
    return targets


def _sizes(model: Decoder, layer: Linear, names: tuple[str, ...]) -> Sequence[int]:
    """The row count of each fused weight of a layer; for the head, the rows within the vocabulary."""
    if layer is model.head:
        return (model.layout.vocab_stop - model.layout.vocab_start,)
    assert layer.packing is not None
    if isinstance(layer, ColumnLinear) and len(names) > 1:
        return layer.parts
    return (layer.packing.num_rows,)


def _experts_of(model: Decoder) -> Iterator[tuple[str, Experts]]:
    for i, block in enumerate(model.layers):
        for module in block.modules():
            if isinstance(module, Experts):
                yield f"model.layers.{i}.mlp.experts", module


def _experts(prefix: str, experts: Experts) -> dict[str, Tensor]:
    """The destinations of the plain (not quantized) weights of experts."""
    targets = {}
    for i in range(experts.downs.num_experts):
        if experts.gate_ups.weight is not None:
            gate, up = experts.gate_ups.weight[i].chunk(2)
            targets[f"{prefix}.{i}.gate_proj.weight"] = gate
            targets[f"{prefix}.{i}.up_proj.weight"] = up
        if experts.downs.weight is not None:
            targets[f"{prefix}.{i}.down_proj.weight"] = experts.downs.weight[i]
    return targets
