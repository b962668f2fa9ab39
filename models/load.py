"""From a checkpoint to a model on this rank: check the names, then stream this rank's slices.

The model is built without memory (meta device), given memory, and filled tensor by tensor, so no rank
ever holds more than its own part and one slice being read. A missing, unknown or mis-shaped weight is
an error that names it: a tensor left uninitialised would be a model that is quietly wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from comm.group import Group
from models.config import HEAD, ModelConfig, expected_shapes, from_gguf, from_hf
from models.gptj import Block as GptJBlock
from models.gptj import GptJ
from models.llama import Block, Llama
from tp.shard import find_spec, slices_of
from weights.checkpoint import Checkpoint
from weights.errors import InputError
from weights.pages import files_of, release_pages

Model = Llama | GptJ
RELEASE_BYTES = 64 << 20  # of a file's pages that may be resident while it is read


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The dimensions that a checkpoint's own metadata declares. Raises InputError."""
    source = str(checkpoint.path)
    if checkpoint.format == "gguf":
        return from_gguf(checkpoint.config, HEAD not in checkpoint.entries, source)
    return from_hf(checkpoint.config, source)


def build_model(config: ModelConfig, group: Group) -> Model:
    """This rank's part of the model of a config; its weights are whatever the device holds."""
    return GptJ(config, group) if config.family == "gptj" else Llama(config, group)


def load_model(
    config: ModelConfig,
    checkpoint: Checkpoint,
    group: Group,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Model:
    """Build this rank's part of the model and fill it.

    `progress` is called with the bytes filled so far and in all. Raises InputError.
    """
    shapes = expected_shapes(config)
    check_names(checkpoint, shapes, config.tie_embeddings)
    with torch.device("meta"):
        model = build_model(config, group)
    model = model.to(dtype).to_empty(device="cpu")
    if config.tie_embeddings:
        model.head.weight = model.embed.weight  # to_empty gave each its own memory
    # Rows of the last ranks' vocabulary blocks that lie past its end must not be noise.
    used = model.layout.vocab_stop - model.layout.vocab_start
    for padded in (model.embed.weight, model.head.weight, model.head.bias):
        if padded is not None:
            padded[used:].zero_()
    targets = destinations(model)
    assert targets.keys() == shapes.keys(), targets.keys() ^ shapes.keys()
    total = sum(target.nbytes for target in targets.values())
    done = unreleased = 0
    for name, target in targets.items():
        if find_spec(name).axis == "first" and group.rank:
            target.zero_()  # rank 0 adds it for all
        else:
            entry = checkpoint.entries[name]
            part = (entry.peek or entry.read)(slices_of(name, shapes[name], model.layout))
            assert part.shape == target.shape, (name, part.shape, target.shape)
            target.copy_(part)
        done += target.nbytes
        unreleased += part.nbytes
        if unreleased >= RELEASE_BYTES:
            # What was read stays in the page cache, but need not count as this process's memory.
            release_pages(files_of(checkpoint.path))
            unreleased = 0
        progress(done, total)
    return model.eval()


def check_names(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], tie_embeddings: bool
) -> None:
    """Raise InputError unless the checkpoint holds exactly these weights, in these shapes."""
    entries = checkpoint.entries
    unused = sorted(entries.keys() - shapes.keys())
    if tie_embeddings and HEAD in unused:
        unused.remove(HEAD)  # a tied head that was stored all the same
    if unused:
        file = entries[unused[0]].file or checkpoint.path
        raise InputError(
            f"{checkpoint.path} holds {len(unused)} weights that this model does not have, "
            f"such as {unused[0]!r} in {file}"
        )
    missing = sorted(shapes.keys() - entries.keys())
    if missing:
        raise InputError(
            f"{checkpoint.path} lacks {len(missing)} weights of this model, such as {missing[0]!r}"
        )
    for name, shape in shapes.items():
        entry = entries[name]
        if entry.shape != shape:
            raise InputError(
                f"{entry.file or checkpoint.path}: {name} has shape {entry.shape}, the model's "
                f"configuration asks for {shape}"
            )


def destinations(model: Model) -> dict[str, Tensor]:
    """Where each canonical weight's slice goes: views into the model's (fused) parameters."""
    used = model.layout.vocab_stop - model.layout.vocab_start
    targets: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed.weight[:used]}

    def put(prefix: str, module: nn.Module, names: tuple[str, ...] = ("",)) -> None:
        """The parameters of a module, divided if they are several weights fused."""
        for kind, value in module.named_parameters(recurse=False):
            parts = value.split(module.parts) if len(names) > 1 else (value,)
            targets.update({f"{prefix}{n}.{kind}": p for n, p in zip(names, parts, strict=True)})

    for i, block in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        qkv = tuple(f"self_attn.{x}_proj" for x in "qkv")
        if isinstance(block, Block):
            put(f"{prefix}.input_layernorm", block.attention_norm)
            put(f"{prefix}.", block.attention.qkv, qkv)
            put(f"{prefix}.self_attn.q_norm", block.attention.q_norm)
            put(f"{prefix}.self_attn.k_norm", block.attention.k_norm)
            put(f"{prefix}.self_attn.o_proj", block.attention.out)
            put(f"{prefix}.post_attention_layernorm", block.mlp_norm)
            put(f"{prefix}.mlp.", block.mlp.gate_up, ("gate_proj", "up_proj"))
            put(f"{prefix}.mlp.down_proj", block.mlp.down)
        else:
            assert isinstance(block, GptJBlock)
            put(f"{prefix}.input_layernorm", block.norm)
            put(f"{prefix}.", block.qkv, qkv)
            put(f"{prefix}.self_attn.o_proj", block.out)
            put(f"{prefix}.mlp.up_proj", block.up)
            put(f"{prefix}.mlp.down_proj", block.down)
    put("model.norm", model.norm)
    if not model.config.tie_embeddings:
        targets[HEAD] = model.head.weight[:used]
        if model.head.bias is not None:
            targets["lm_head.bias"] = model.head.bias[:used]
    return targets
