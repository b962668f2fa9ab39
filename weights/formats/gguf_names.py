"""The tensor names of GGUF's architectures, and what llama.cpp's converter does to the tensors. Pure;
free of torch.

Sources: the names are those of the `gguf` package's `constants.py` and `tensor_mapping.py`. The changes
to values and rows are those of `modify_tensors`, in the architectures' classes of llama.cpp's
`convert_hf_to_gguf.py`. Its class for Llama reorders the rows of query and key projections for rotary
embeddings that rotate neighbors (`undo_permute`). Granite's and SmolLM3's classes are derived from it,
and Mistral and Mixtral are written as "llama". For the other architectures the rotary embeddings rotate
halves, and the rows stay in order.

What is not here: GPT-J. The package has its names, llama.cpp has neither converter nor graph for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from base.errors import InputError
from weights.names import GATE_UP, QKV, ROTATED, CanonicalPart, Parts

# Settings of the rotary embeddings that are stored as tensors. They are not weights.
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_SHARED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_GEMMA = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Falcon with two norms: `attn_norm`, the only norm of smaller Falcons, is the MLP's (`ln_mlp`).
_TWO_NORMS = _LAYER | {"attn_norm": "mlp_layernorm", "attn_norm_2": "input_layernorm"}
_EXPERTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


@dataclass(frozen=True)
class Naming:
    """For one architecture: the names within a layer, the fused names, whether the rows of query and
    key are interleaved, and whether norms are stored with 1 added (Gemma)."""

    names: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    fused: Mapping[str, Parts] = field(default_factory=dict)
    interleaved: bool = False
    plus_one: bool = False


_NAMINGS = {
    "llama": Naming(interleaved=True),
    "granite": Naming(interleaved=True),
    "smollm3": Naming(interleaved=True),
    "qwen2": Naming(),
    "qwen3": Naming(),
    "qwen3moe": Naming(),
    "phi3": Naming(fused={"attn_qkv": QKV, "ffn_up": GATE_UP}),
    "gemma2": Naming(_GEMMA, plus_one=True),
    "gemma3": Naming(_GEMMA, plus_one=True),
    # The converter has ordered the rows of the fused projection as queries, keys, values.
    "falcon": Naming(fused={"attn_qkv": QKV}),
}
ARCHITECTURES = tuple(_NAMINGS)


def naming_of(architecture: str, stored: Collection[str]) -> Naming:
    """The naming of a file of this architecture that stores tensors of these names."""
    if architecture == "falcon" and "blk.0.attn_norm_2.weight" in stored:
        return Naming(_TWO_NORMS, {"attn_qkv": QKV})
    return _NAMINGS[architecture]


def translate_gguf(stored: str, naming: Naming, num_experts: int = 0) -> tuple[CanonicalPart, ...]:
    """The canonical tensors in the stored tensor of this name, as `weights.names.translate`; () for a
    name that the architecture does not have. `num_experts`: how many experts the tensor stacks."""
    if stored in _SHARED:
        name = _SHARED[stored]
        return (CanonicalPart(name, plus_one=naming.plus_one and "norm" in name),)
    match = re.fullmatch(
        r"blk\.(\d{1,6})\.([a-z_0-9]+?)(_exps|\.(\d{1,6}))?\.(weight|bias)", stored, re.ASCII
    )
    if match is None:
        return ()
    layer, name, stacked, expert, kind = match.groups()
    prefix = f"model.layers.{int(layer)}"
    if stacked:
        if name not in _EXPERTS:
            return ()
        inner = f"{_EXPERTS[name]}.{kind}"
        if expert is not None:  # older files: a tensor per expert
            return (CanonicalPart(f"{prefix}.mlp.experts.{int(expert)}.{inner}"),)
        return tuple(
            CanonicalPart(f"{prefix}.mlp.experts.{i}.{inner}", expert=i) for i in range(num_experts)
        )
    if name in naming.fused:
        return tuple(
            CanonicalPart(f"{prefix}.{part}.{kind}", rows) for rows, part in naming.fused[name]
        )
    if name not in naming.names:
        return ()
    name = naming.names[name]
    return (
        CanonicalPart(
            f"{prefix}.{name}.{kind}",
            interleaved=naming.interleaved and name in ROTATED,
            plus_one=naming.plus_one and "norm" in name,
        ),
    )


def same_for_all_layers(config: Mapping[str, Any], key: str, source: object) -> Any:
    """The value of a key that may have an entry for each layer; None if it is missing. Raises
    InputError if the layers differ."""
    value = config.get(key)
    if not isinstance(value, list):
        return value
    if not value or any(entry != value[0] for entry in value):
        raise InputError(
            f"{source}: {key} is {str(value)[:100]}; only models whose layers all have the same size "
            "are supported"
        )
    return value[0]
