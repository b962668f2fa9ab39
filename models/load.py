"""From a checkpoint to a model on this rank: check the names, then stream this rank's slices.

The model is built without memory (meta device), given memory, and filled tensor by tensor, so no rank
ever holds more than its own part and one slice being read. A missing, unknown or mis-shaped weight is
an error that names it: a tensor left uninitialised would be a model that is quietly wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from comm.group import Group
from models.config import HEAD, ModelConfig, expected_shapes, from_gguf, from_hf
from models.llama import Block, Llama
from tp.shard import slices_of
from weights.checkpoint import Checkpoint
from weights.errors import InputError


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The dimensions that a checkpoint's own metadata declares. Raises InputError."""
    source = str(checkpoint.path)
    if checkpoint.format == "gguf":
        return from_gguf(checkpoint.config, HEAD not in checkpoint.entries, source)
    return from_hf(checkpoint.config, source)


def load_model(
    config: ModelConfig,
    checkpoint: Checkpoint,
    group: Group,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Llama:
    """Build this rank's part of the model and fill it.

    `progress` is called with the bytes filled so far and in all. Raises InputError.
    """
    shapes = expected_shapes(config)
    check_names(checkpoint, shapes, config.tie_embeddings)
    with torch.device("meta"):
        model = Llama(config, group)
    model = model.to(dtype).to_empty(device="cpu")
    if config.tie_embeddings:
        model.head.weight = model.embed.weight  # to_empty gave each its own memory
    # Rows of the last ranks' vocabulary blocks that lie past its end must not be noise.
    used = model.layout.vocab_stop - model.layout.vocab_start
    model.embed.weight[used:].zero_()
    model.head.weight[used:].zero_()
    targets = destinations(model)
    total = sum(target.nbytes for target in targets.values())
    done = 0
    for name, target in targets.items():
        part = checkpoint.entries[name].read(slices_of(name, shapes[name], model.layout))
        assert part.shape == target.shape, (name, part.shape, target.shape)
        target.copy_(part)
        done += target.nbytes
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
        raise InputError(
            f"{checkpoint.path} holds {len(unused)} weights that this model does not have, "
            f"such as {unused[0]!r}"
        )
    missing = sorted(shapes.keys() - entries.keys())
    if missing:
        raise InputError(
            f"{checkpoint.path} lacks {len(missing)} weights of this model, such as {missing[0]!r}"
        )
    for name, shape in shapes.items():
        if entries[name].shape != shape:
            raise InputError(
                f"{checkpoint.path}: {name} has shape {entries[name].shape}, the model's "
                f"configuration asks for {shape}"
            )


def destinations(model: Llama) -> dict[str, Tensor]:
    """Where each canonical weight's slice goes: views into the model's (fused) parameters."""
    used = model.layout.vocab_stop - model.layout.vocab_start
    targets: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed.weight[:used]}
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        prefix = f"model.layers.{i}"
        attention, mlp = block.attention, block.mlp
        q, k, v = attention.qkv.weight.split(attention.qkv.parts)
        gate, up = mlp.gate_up.weight.split(mlp.gate_up.parts)
        targets |= {
            f"{prefix}.input_layernorm.weight": block.attention_norm.weight,
            f"{prefix}.self_attn.q_proj.weight": q,
            f"{prefix}.self_attn.k_proj.weight": k,
            f"{prefix}.self_attn.v_proj.weight": v,
            f"{prefix}.self_attn.o_proj.weight": attention.out.weight,
            f"{prefix}.post_attention_layernorm.weight": block.mlp_norm.weight,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": mlp.down.weight,
        }
    targets["model.norm.weight"] = model.norm.weight
    if not model.config.tie_embeddings:
        targets[HEAD] = model.head.weight[:used]
    return targets
