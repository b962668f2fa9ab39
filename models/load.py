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
from models.config import HEAD, ModelConfig, expected_shapes
from models.config_gguf import from_gguf
from models.config_hf import from_hf
from models.decoder import Decoder
from models.mlp import Experts
from tp.shard import find_spec, slices_of
from weights.checkpoint import Checkpoint
from weights.errors import InputError
from weights.pages import files_of, release_pages

RELEASE_BYTES = 64 << 20  # of a file's pages that may be resident while it is read


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The dimensions that a checkpoint's own metadata declares. Raises InputError."""
    source = str(checkpoint.path)
    if checkpoint.format == "gguf":
        return from_gguf(checkpoint.config, checkpoint.entries, source)
    return from_hf(checkpoint.config, source)


def load_model(
    config: ModelConfig,
    checkpoint: Checkpoint,
    group: Group,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Build this rank's part of the model on `device` and fill it.

    `progress` is called with the bytes filled so far and in all. Raises InputError.
    """
    shapes = expected_shapes(config)
    check_names(checkpoint, shapes, config.tie_embeddings)
    with torch.device("meta"):
        model = Decoder(config, group)
    model = model.to(dtype).to_empty(device=device)
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


# What the modules of a block hold, canonically. Several names: fused along the outputs.
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
# By the kind of block, what is called alike and is another thing.
_MLP_NORM = {"llama": "post_attention_layernorm", "parallel": "mlp_layernorm"}


def destinations(model: Decoder) -> dict[str, Tensor]:
    """Where each canonical weight's slice goes: views into the model's (fused) parameters."""
    used = model.layout.vocab_stop - model.layout.vocab_start
    targets: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed.weight[:used]}

    def put(prefix: str, module: nn.Module, names: tuple[str, ...]) -> None:
        """The parameters of a module, divided if they are several weights fused."""
        for kind, value in module.named_parameters(recurse=False):
            parts = value.split(module.parts) if len(names) > 1 else (value,)
            targets.update({f"{prefix}{n}.{kind}": p for n, p in zip(names, parts, strict=True)})

    for i, block in enumerate(model.layers):
        for path, module in block.named_modules():
            names = PARTS.get(path, ())
            if path == "mlp_norm":
                names = (_MLP_NORM[model.config.block],)
            if isinstance(module, Experts):
                targets.update(_experts(f"model.layers.{i}.mlp.experts", module))
            elif names:
                put(f"model.layers.{i}.", module, names)
    put("model.", model.norm, ("norm",))
    if not model.config.tie_embeddings:
        targets[HEAD] = model.head.weight[:used]
        if model.head.bias is not None:
            targets["lm_head.bias"] = model.head.bias[:used]
    return targets


def _experts(prefix: str, experts: Experts) -> dict[str, Tensor]:
    targets = {}
    for i, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down, strict=True)):
        gate, up = gate_up.chunk(2)
        targets[f"{prefix}.{i}.gate_proj.weight"] = gate
        targets[f"{prefix}.{i}.up_proj.weight"] = up
        targets[f"{prefix}.{i}.down_proj.weight"] = down
    return targets
