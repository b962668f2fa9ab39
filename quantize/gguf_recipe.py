"""The recipes of GGUF files: which tensor is stored in which form. Pure; free of torch.

A recipe has the name that llama.cpp gives it and stores each tensor as llama.cpp does, so that files
are as large as people expect. The forms named _M spend more bits on the tensors that need them: the
value and down projections of about half of the layers, and the head.

Source: the choices of `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp`. What is not here: its
exceptions for an importance matrix, and for Falcon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PLAIN = ("F32", "F16")


@dataclass(frozen=True)
class Recipe:
    """`form`: of most matrices; `more`: of those that need more bits; `head`: of the head, or of the
    embedding where it is the head; `file_type`: the number that llama.cpp has for the recipe."""

    form: str
    more: str
    head: str
    file_type: int


RECIPES = {
    "Q4_0": Recipe("Q4_0", "", "Q6_K", 2),
    "Q8_0": Recipe("Q8_0", "", "Q8_0", 7),
    "Q4_K_M": Recipe("Q4_K", "Q6_K", "Q6_K", 15),
    "Q5_K_M": Recipe("Q5_K", "Q6_K", "Q6_K", 17),
    "Q6_K": Recipe("Q6_K", "", "Q6_K", 18),
}
_BLOCK, _SUPER = 32, 256
# For rows that are not whole blocks of 256: the form of blocks of 32 with at least as many bits.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Dimensions:
    """What a recipe needs to know of a model: the number of layers and of experts, whether query heads
    share KV heads, and whether the embedding is also the head."""

    num_layers: int
    num_experts: int
    shared_kv: bool
    tied: bool


def form_of(name: str, shape: Sequence[int], recipe: Recipe, model: Dimensions) -> str:
    """The form of the tensor with this GGUF name: a key of weights.schemes.GGUF_SCHEMES, or one of
    `PLAIN`. Vectors and routers are stored as they are, in F32."""
    if len(shape) < 2 or "_norm" in name or "ffn_gate_inp" in name:
        return "F32"
    form = _wanted(name, recipe, model)
    if shape[-1] % _SUPER and form in _FALLBACK:
        form = _FALLBACK[form]
    if shape[-1] % _BLOCK:
        return "F16"
    return form


def _wanted(name: str, recipe: Recipe, model: Dimensions) -> str:
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        return recipe.head
    if not name.startswith("blk."):
        return recipe.form
    _, number, kind, *_ = name.split(".")
    layer, form = int(number), recipe.form
    if recipe.more and kind == "attn_qkv":
        return "Q5_K" if form == "Q4_K" else recipe.more
    if recipe.more and kind in ("attn_v", "ffn_down", "ffn_down_exps"):
        if needs_more(layer, model.num_layers):
            form = recipe.more
        elif kind == "attn_v" and form == "Q4_K" and model.num_layers == 80 and model.shared_kv:
            form = "Q5_K"  # the models of 70B: eight query heads share each value head
    if model.num_experts == 8 and form != "Q8_0":  # attention is small beside eight experts
        if kind in ("attn_v", "attn_k"):
            return "Q8_0"
        if kind == "attn_output" and recipe.more and form == "Q4_K":
            return "Q5_K"
    return form


def needs_more(layer: int, num_layers: int) -> bool:
    """Whether a layer's value and down projections get more bits: in the first and the last eighth of
    the layers, and in every third layer between them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
