"""The canonical name of a stored tensor, and which of its rows it stands for. Pure; free of torch.

Canonical names are those of Hugging Face's Llama. Most families use them already. Translated are
GPT-J, Falcon, Mixtral's experts, Meta's releases, gpt-fast, fused projections (Phi-3), and files saved
from a base model (without the prefix `model.`). A name that no family has stays as it is, so that the
loader can report it. GGUF's names: `weights.formats.gguf_names`.

Two kinds of files store the rows of the query and key projections interleaved, for rotary embeddings
that rotate neighbors (2i, 2i+1); the canonical order rotates halves (i, i + half a head). These are
Meta's with gpt-fast's, and GGUF for some architectures. `CanonicalPart.interleaved` marks such rows,
and weights.views restores the canonical order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CanonicalPart:
    """One canonical tensor within a stored one: all of it (`part` ""), or the rows of "q", "k", "v",
    "gate" or "up" in a fused one. `interleaved`: its rows are not in canonical order. `grouped`: the
    fused rows are ordered by KV head, each preceded by its query heads (Falcon). `expert`: its index
    in a stack of matrices. `plus_one`: it is stored with 1 added."""

    name: str
    part: str = ""
    interleaved: bool = False
    grouped: bool = False
    expert: int | None = None
    plus_one: bool = False


# Buffers that some releases store although they can be computed; they are not weights.
_DROPPED = re.compile(
    r"(.*\.)?(attn\.(bias|masked_bias)|rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs)"
)
_SHARED = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "transformer.ln_f.bias": "model.norm.bias",
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GPTJ = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.o_proj",
    "mlp.fc_in": "mlp.up_proj",
    "mlp.fc_out": "mlp.down_proj",
    "ln_1": "input_layernorm",
}
_FALCON = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "ln_attn": "input_layernorm",
    "ln_mlp": "mlp_layernorm",
}
_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_META = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# The prefix that is missing in a file saved from a base model (one without an LM head).
_BASES = (
    (r"(embed_tokens|layers\.\d{1,6}\.(self_attn|mlp|block_sparse_moe|\w+_layernorm))\..+", "model."),
    (r"(wte|word_embeddings|ln_f|h\.\d{1,6})\..+", "transformer."),
)
QKV = (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"))
GATE_UP = (("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"))
# (prefix of a layer, its names, its fused names, whether query and key rows are interleaved)
Parts = tuple[tuple[str, str], ...]
_FAMILIES: tuple[tuple[str, dict[str, str], dict[str, Parts], bool], ...] = (
    (r"transformer\.h", _GPTJ | _FALCON, {"self_attention.query_key_value": QKV}, False),
    (r"layers", _META, {"attention.wqkv": QKV}, True),
    (r"model\.layers", {}, {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP}, False),
)
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def translate(stored: str) -> tuple[CanonicalPart, ...]:
    """The canonical tensors in the stored tensor of this name: none for a buffer, several for a fused
    projection, one for any other."""
    if _DROPPED.fullmatch(stored):
        return ()
    for pattern, prefix in _BASES:
        if re.fullmatch(pattern, stored, re.ASCII):
            stored = prefix + stored
    if stored in _SHARED:
        return (CanonicalPart(_SHARED[stored]),)
    for prefix, names, fused, interleaved in _FAMILIES:
        match = re.fullmatch(rf"{prefix}\.(\d{{1,6}})\.([\w.]+)\.(weight|bias)", stored, re.ASCII)
        if match is None:
            continue
        layer, middle, kind = match.groups()
        grouped = middle == "self_attention.query_key_value"
        found = fused.get(middle) or ((("", names[middle]),) if middle in names else ())
        if found:
            return tuple(
                CanonicalPart(
                    f"model.layers.{int(layer)}.{name}.{kind}",
                    part,
                    interleaved and name in ROTATED,
                    grouped,
                )
                for part, name in found
            )
    match = re.fullmatch(
        r"model\.layers\.(\d{1,6})\.block_sparse_moe\.(gate|experts\.(\d{1,6})\.(w[123]))\.weight",
        stored,
        re.ASCII,
    )
    if match is not None:
        layer, middle, expert, matrix = match.groups()
        name = "gate" if middle == "gate" else f"experts.{int(expert)}.{_EXPERT[matrix]}"
        return (CanonicalPart(f"model.layers.{int(layer)}.mlp.{name}.weight"),)
    return (CanonicalPart(stored),)


def untranslated(stored: str) -> tuple[CanonicalPart, ...]:
    """The tensor under its stored name, without translation."""
    return (CanonicalPart(stored),)
