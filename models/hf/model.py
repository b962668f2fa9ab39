"""Tensor parallelism for any model of the transformers library that has a tensor-parallel plan.

The model's own code runs, with Yoke's layers, collectives, cache and attention in the places that its
plan names (`models.hf.plan`, `models.hf.attention`). The model is built on the meta device, tried with
shapes only, given memory, and filled with this rank's slices of the checkpoint. Code that comes with a
checkpoint is never run.

Only `engine=hf` imports this module: transformers is an optional package.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from base.errors import InputError
from comm import ops
from comm.group import Group
from models.config import Rope, stretched_length
from models.hf.attention import NAME, LayerCache, Probe, Split, StepCache, attend, visible
from models.hf.config import check_layers
from models.hf.layers import Selected
from models.hf.plan import Weight, divide_model
from models.load import RELEASE_BYTES, missing_one
from weights.checkpoint import Checkpoint, Entry
from weights.pages import release_pages

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, visible)


class HfModel(nn.Module):
    """This rank's part of a transformers model, with the interface of `models.decoder.Decoder`."""

    def __init__(self, inner: Any, ends: tuple[Any, Any], caches: list[LayerCache]) -> None:
        super().__init__()
        self.inner = inner
        config = inner.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.max_seq_len = _max_length(config)
        self.ends = ends  # embedding and head; in a tuple, since they are registered in `inner`
        self.caches = nn.ModuleList(caches)

    def setup(self, num_rows: int, cache_len: int) -> None:
        """Allocate the KV caches of `num_rows` sequences for positions 0..cache_len-1."""
        like = next(self.inner.parameters())
        for cache in self.caches:
            assert isinstance(cache, LayerCache)
            cache.setup(num_rows, cache_len, like)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        wanted: Tensor | None = None,
        row: Tensor | None = None,
    ) -> Tensor:
        """Logits of the `wanted` tokens: float32 [M, vocab_size].

        tokens, positions: int64 [B, T]. Sequence i uses cache row i or, with `row` (int64 [1]; B = 1),
        that row. `wanted`: int64 [M], indices into the B * T tokens; None means all and requires T = 1.
        The cache entries of padding are overwritten before anything attends to them.
        """
        cache = StepCache(positions, self.caches, row)  # type: ignore[arg-type]
        outputs = self.inner(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            select=wanted,
        )
        return outputs.logits.flatten(0, 1).float()

    def extend(self, tokens: Tensor, positions: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
        """As `Decoder.extend`, but all tokens belong to one cache row."""
        return self(tokens.unsqueeze(0), positions.unsqueeze(0), wanted, rows[:1])

    def decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `Decoder.decode`."""
        return self(tokens.unsqueeze(1), positions.unsqueeze(1))

    def decode_greedy(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `Decoder.decode_greedy`, but every rank computes the argmax from all logits."""
        return ops.whole_argmax(self.decode(tokens, positions))


def _max_length(config: Any) -> int | None:
    """The context length of a text model's configuration, after rotary scaling; None if it has none.
    (Files with rotary settings per type of layer already hold the scaled length.)"""
    trained: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if trained is None or rope.get("rope_type") not in ("linear", "yarn"):
        return trained
    return stretched_length(
        Rope(
            kind=rope["rope_type"],
            factor=rope["factor"] or 1.0,
            original_max_seq_len=rope.get("original_max_position_embeddings") or trained,
        ),
        trained,
    )


def build_model(folder: Path, group: Group, dtype: torch.dtype) -> tuple[HfModel, dict[str, Weight]]:
    """This rank's part on the meta device, and the weights to read for it, by stored name. Raises
    InputError."""
    check_layers(folder)
    transformers.logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            inner: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=NAME, trust_remote_code=False
            )
    except Exception as error:  # the library has no single exception for an invalid config
        raise InputError(
            f"{folder}: transformers cannot build this model ({_reason(error)}); see its config.json"
        ) from error
    inner.requires_grad_(False).eval()
    try:
        with torch.device("meta"):
            weights, splits = divide_model(inner, group)
        ends = inner.get_input_embeddings(), inner.get_output_embeddings()
        prefix = inner.base_model_prefix
        setattr(inner, prefix, Selected(getattr(inner, prefix)))
        return HfModel(inner, ends, _try_shapes(inner, splits)), weights
    except InputError:
        raise
    except Exception as error:  # the model's code may raise anything if a sharded shape does not fit
        name = f"{type(inner).__name__} ({inner.config.model_type})"
        raise InputError(f"{name} cannot be sharded as its plan says: {_reason(error)}") from error


@torch.no_grad()
def _try_shapes(inner: Any, splits: dict[int, Split]) -> list[LayerCache]:
    """Run one step on the meta device, which costs nothing, to check that the shapes of the sharded
    model fit and to find the sizes of each layer's cache."""
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    probes = [Probe(splits[layer], 3) for layer in range(len(splits))]
    inner(
        input_ids=tokens,
        position_ids=tokens,
        past_key_values=StepCache(tokens, probes),
        use_cache=True,
        select=tokens[:, 0],
    )
    for layer, probe in enumerate(probes):
        if len(probe.seen) != 1:
            raise RuntimeError(f"layer {layer} writes its cache {len(probe.seen)} times in a step")
    return [LayerCache(probe.split, *probe.seen[0]) for probe in probes]


def _reason(error: Exception) -> str:
    """The message of an exception of the library, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def fill_model(
    model: HfModel,
    weights: dict[str, Weight],
    checkpoint: Checkpoint,
    group: Group,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: torch.device | str = "cpu",
) -> HfModel:
    """Give the model from `build_model` memory on `device` and fill it with this rank's slices of
    `checkpoint`, whose entries have the names stored in its files. `progress` is called with the bytes
    filled so far and in total. Raises InputError."""
    entries = _entries(checkpoint, weights, model.inner)
    embed, head = model.ends
    tied = head.weight is embed.weight
    model.to_empty(device=device)
    if tied:
        head.weight = embed.weight  # to_empty gave each its own memory
    _compute_buffers(model.inner)
    targets = {name: getattr(weight.module, weight.kind) for name, weight in weights.items()}
    filled_ids = {id(target) for target in targets.values()}
    assert all(id(value) in filled_ids for value in model.parameters())
    total = sum(target.nbytes for target in targets.values())
    done = unreleased = 0
    for name, target in targets.items():
        part = _part(weights[name], entries[name], group)
        if part is None:
            target.zero_()
        else:
            dim = weights[name].dim
            filled = target if dim is None else target.narrow(dim, 0, part.shape[dim])
            assert filled.shape == part.shape, (name, filled.shape, part.shape)
            filled.copy_(part)
            if dim is not None:  # zero the rows past the end of a table
                target.narrow(dim, part.shape[dim], target.shape[dim] - part.shape[dim]).zero_()
            unreleased += part.nbytes
        done += target.nbytes
        if unreleased >= RELEASE_BYTES:
            release_pages(checkpoint.files)
            unreleased = 0
        progress(done, total)
    return model.eval()


def _part(weight: Weight, entry: Entry, group: Group) -> Tensor | None:
    """This rank's slice; None if only rank 0 holds the weight."""
    if weight.first and group.rank:
        return None
    slices = [slice(0, size) for size in weight.shape]
    if weight.dim is not None:
        slices[weight.dim] = slice(weight.start, weight.stop)
    return (entry.peek or entry.read)(tuple(slices))


def _entries(checkpoint: Checkpoint, weights: dict[str, Weight], inner: Any) -> dict[str, Entry]:
    """The checkpoint's entries under the names of the model's weights. Raises InputError unless names
    and shapes are exactly the model's."""
    tied = set(getattr(inner, "_tied_weights_keys", None) or ())
    ignored = [*(inner._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    # Releases of the library have renamed modules; it has a table of the names in older files.
    renamings = [
        change for change in get_model_conversion_mapping(inner) if isinstance(change, WeightRenaming)
    ]
    entries: dict[str, Entry] = {}
    unused: list[str] = []
    for stored, entry in checkpoint.entries.items():
        name, _ = rename_source_key(stored, renamings, [])
        if name in entries:
            raise InputError(f"{checkpoint.path} stores {name!r} twice, once as {stored!r}")
        if name in weights:
            entries[name] = entry
        elif name not in tied and not any(re.search(pattern, name) for pattern in ignored):
            unused.append(stored)
    missing = sorted(weights.keys() - entries.keys())
    if unused or missing:
        parts = []
        if missing:
            one = missing_one(missing, checkpoint)
            parts.append(f"lacks {len(missing)} weights of this model, such as {one}")
        if unused:
            parts.append(f"holds {len(unused)} that it does not have, such as {min(unused)!r}")
        raise InputError(
            f"{checkpoint.path} {' and '.join(parts)}; engine=hf needs a checkpoint of exactly this "
            "model: download it again, or save it again with save_pretrained"
        )
    for name, weight in weights.items():
        if entries[name].shape != weight.shape:
            raise InputError(
                f"{entries[name].file or checkpoint.path}: {name} has shape {entries[name].shape}, "
                f"but the model's configuration asks for {weight.shape}"
            )
    return entries


@torch.no_grad()
def _compute_buffers(inner: Any) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies) with the model's own
    initialization. Raises InputError for a buffer that this does not set."""
    for prefix, module in inner.named_modules():
        buffers = {
            f"{prefix}.{name}": value
            for name, value in module._buffers.items()
            if name in module._non_persistent_buffers_set and value is not None
        }
        marks = {}
        for name, value in buffers.items():
            if not value.is_floating_point() and value.dtype != torch.int64:
                raise InputError(
                    f"{type(inner).__name__}: its buffer {name} is neither floating-point nor "
                    "int64; engine=hf cannot initialize it"
                )
            floats = value.is_floating_point()
            marks[name] = float("nan") if floats else torch.iinfo(torch.int64).min
            value.fill_(marks[name])
        if buffers:
            inner._init_weights(module)
        for name, value in buffers.items():
            left = value.isnan() if value.is_floating_point() else value == marks[name]
            if left.any():
                raise InputError(
                    f"{type(inner).__name__}: its initialization does not set the buffer {name}; "
                    "engine=hf cannot run this model"
                )
