"""Turns a transformers model into this rank's part of it, by the model's tensor-parallel plan.

A plan (`base_model_tp_plan`) maps names of modules to styles: "colwise" shards the outputs of a Linear,
"rowwise" its inputs, and so on. Here each Linear that a plan names is replaced in place by one of
Yoke's layers, on the meta device, and the weights to read for it are recorded. `tp.heads` splits heads
(whole heads; KV heads are replicated where ranks share them) and `tp.shard` splits MLP widths. Both
work for any number of ranks, while the library's own splits need multiples.

What is not here: experts, and plans with styles that `_STYLES` does not list. They are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from base.errors import InputError
from comm.group import Group
from models.hf.attention import Split
from models.hf.layers import SummedRowLinear
from tp.heads import check_world_size, split_heads
from tp.layers import ColumnLinear, LMHead, RowLinear, VocabEmbedding
from tp.shard import FFN_UNIT, split_units

_WHOLE = ("replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "local_params")
_GATHERED = ("colwise_gather_output", "colwise_rep")
_SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
_STYLES = ("colwise", "rowwise", *_GATHERED, *_SPLIT_INPUT, *_WHOLE)
# Children that mark a module as attention.
_KEYS = ("k_proj", "qkv_proj", "query_key_value", "kv_b_proj")


@dataclass(frozen=True)
class Weight:
    """One weight of a checkpoint, of full `shape`, and the tensor `kind` of `module` that its part
    fills.

    The part is `[start, stop)` of dimension `dim`, or all (None); the rest of the tensor is zero.
    `first`: full on rank 0 and zero on the others (a bias that is added before a sum over the ranks).
    """

    module: nn.Module
    kind: str
    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0
    first: bool = False


@dataclass(frozen=True)
class _Work:
    """The state that the functions below share: the model, its name in messages, and the results."""

    model: nn.Module
    name: str
    plan: Mapping[str, str]
    group: Group
    num_heads: int
    num_kv_heads: int
    weights: dict[str, Weight]
    splits: dict[int, Split]

    def refuse(self, why: str) -> InputError:
        return InputError(f"the tensor-parallel plan of {self.name} cannot be applied: {why}")


def divide_model(model: Any, group: Group) -> tuple[dict[str, Weight], dict[int, Split]]:
    """Replace the modules that the plan of `model` (on the meta device) shards, in place.

    Returns the weights to read, by stored name, and the split of the heads, by layer. Raises InputError
    that names what cannot be applied.
    """
    text = model.config.get_text_config()
    name = f"{type(model).__name__} ({model.config.model_type})"
    base = text.base_model_tp_plan
    if not base:
        raise InputError(
            f"{name} has no tensor-parallel plan (base_model_tp_plan) in the installed transformers: "
            "engine=hf cannot run it"
        )
    work = _Work(
        model, name, model.tp_plan, group, *_head_counts(name, text), dict(_weights(model)), {}
    )
    check_world_size(work.num_heads, group.size)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise work.refuse(f"it has layers of type {', '.join(sorted(kinds))}")
    if not getattr(model, "_supports_attention_backend", False):
        raise work.refuse("its attention cannot be replaced (_supports_attention_backend is not set)")
    rope = getattr(text, "rope_parameters", None) or {}
    scaling = rope.get("rope_type", "default")
    if scaling in ("dynamic", "longrope"):
        raise work.refuse(f"its rotary scaling {scaling!r} changes with the length of the text")
    ends = _divide_ends(work)
    for prefix, children in _by_parent(work, ends).items():
        _divide_module(work, prefix, children)
    layers = set(range(text.num_hidden_layers))
    if work.splits.keys() != layers:
        missing = sorted(layers ^ work.splits.keys())
        raise work.refuse(f"it does not shard the attention of layers {missing[:8]}")
    return work.weights, work.splits


def _head_counts(name: str, text: Any) -> tuple[int, int]:
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    for count in (heads, kv_heads):
        if type(count) is not int or count < 1:
            raise InputError(f"{name}: {count!r} heads; engine=hf needs one positive number")
    if heads % kv_heads:
        raise InputError(f"{name}: {heads} query heads are not a multiple of {kv_heads} KV heads")
    return heads, kv_heads


def _weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """All weights, unsharded; tied weights come once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        buffers = {k: b for k, b in module._buffers.items() if k not in passing}
        for kind, value in (module._parameters | buffers).items():
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                yield f"{prefix}.{kind}".lstrip("."), Weight(module, kind, tuple(value.shape))


def _divide_ends(work: _Work) -> set[str]:
    """Shard embedding and head by vocabulary, if they are plain tables. Returns their names."""
    model: Any = work.model
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise work.refuse("the model has no head that makes logits")
    names = {id(module): name for name, module in work.model.named_modules()}
    embed_name, head_name = names[id(embed)], names[id(head)]
    tied = head.weight is embed.weight
    block = -(-embed.weight.shape[0] // work.group.size)
    plain = type(embed) is nn.Embedding and embed.max_norm is None
    if tied and type(head) is not nn.Linear:
        plain = False  # both stay unsharded
    style = work.plan.get(head_name)
    if style is not None and style not in _GATHERED:
        raise work.refuse(f"style {style!r} of {head_name}")
    table: VocabEmbedding | None = None
    if plain:
        rows, dim = embed.weight.shape
        start = min(work.group.rank * block, rows)
        table = VocabEmbedding(block, start, dim, work.group)
        _put(work, embed_name, table, table, {"weight": (0, start, min(start + block, rows))})
    if type(head) is nn.Linear and ((tied and table is not None) or (not tied and style)):
        _gathered(work, head_name, head, table.weight if tied and table is not None else None)
    return {embed_name, head_name}


def _by_parent(work: _Work, done: set[str]) -> dict[str, dict[str, str]]:
    """The expanded plan: parent's name -> child -> style. Raises InputError for unknown styles."""
    rules = [
        (re.compile(re.escape(key).replace(r"\*", r"\d+")), style) for key, style in work.plan.items()
    ]
    places = {name for name, _ in work.model.named_modules()} | work.weights.keys()
    found: dict[str, dict[str, str]] = {}
    for place in sorted(places - done):
        for rule, style in rules:
            if rule.fullmatch(place):
                if style not in _STYLES:
                    raise work.refuse(f"style {style!r} of {place}; supported: {', '.join(_STYLES)}")
                parent, _, child = place.rpartition(".")
                found.setdefault(parent, {})[child] = style
    return found


def _divide_module(work: _Work, prefix: str, children: dict[str, str]) -> None:
    """Replace the sharded children of one module: an attention, or a module with one inner width."""
    children = {child: style for child, style in children.items() if style not in _WHOLE}
    if not children:
        return
    parent = work.model.get_submodule(prefix)
    layer = getattr(parent, "layer_idx", None)
    if type(layer) is int and any(key in children for key in _KEYS):
        _divide_attention(work, prefix, parent, layer, children)
        return
    inner = {  # the widths that "colwise" makes and "rowwise" takes
        style: {_linear(work, prefix, child).weight.shape[style == "rowwise"] for child in own}
        for style in ("colwise", "rowwise")
        if (own := [child for child, other in children.items() if other == style])
    }
    if "colwise" in inner and inner["colwise"] != inner.get("rowwise"):
        raise work.refuse(f"{prefix} has sharded outputs, but no sharded inputs of the same width")
    for child, style in children.items():
        name, linear = f"{prefix}.{child}", _linear(work, prefix, child)
        out_features, in_features = linear.weight.shape
        if style == "colwise":
            _column(work, name, linear, *_width(work, out_features))
        elif style in _GATHERED:
            _gathered(work, name, linear)
        else:
            _row(work, name, linear, *_width(work, in_features))


def _width(work: _Work, size: int) -> tuple[int, int]:
    return split_units(size, FFN_UNIT, work.group.rank, work.group.size)


def _divide_attention(
    work: _Work, prefix: str, parent: Any, layer: int, children: dict[str, str]
) -> None:
    if layer in work.splits:
        raise work.refuse(f"layer {layer} has two attention modules; {prefix} is the second")
    whole = any(children.get(key) in _GATHERED for key in _KEYS)
    latent = "kv_b_proj" in children
    # Latent attention expands to as many KV heads as query heads. Fused rows that are not gathered are
    # ordered by head. (If they are not, trying the shapes finds it.)
    alike = latent or "query_key_value" in children
    kv_heads = work.num_heads if alike else work.num_kv_heads
    if children.get("qkv_proj") == "colwise":
        raise work.refuse(f"{prefix}.qkv_proj is fused and not gathered")
    heads = split_heads(work.num_heads, kv_heads, work.group.rank, work.group.size)
    for child, style in children.items():
        name = f"{prefix}.{child}"
        is_kv = child in ("k_proj", "v_proj")
        count = kv_heads if is_kv else work.num_heads
        bounds = (heads.kv_start, heads.kv_stop) if is_kv else (heads.q_start, heads.q_stop)
        if isinstance(parent._parameters.get(child), nn.Parameter) and style == "colwise":
            unit = _unit(work, name, parent._parameters[child].shape[0], count)
            _bare(work, name, parent, child, bounds[0] * unit, bounds[1] * unit)
            continue
        linear = _linear(work, prefix, child)
        out_features, in_features = linear.weight.shape
        if style in _GATHERED:
            _gathered(work, name, linear)
        elif style == "colwise" and not whole:
            unit = _unit(work, name, out_features, count)
            _column(work, name, linear, bounds[0] * unit, bounds[1] * unit)
        elif style in (_SPLIT_INPUT if whole else ("rowwise",)):
            unit = _unit(work, name, in_features, count)
            _row(work, name, linear, bounds[0] * unit, bounds[1] * unit)
        else:
            raise work.refuse(f"style {style!r} of {name} beside gathered projections")
    for child, norm_heads in (("q_norm", work.num_heads), ("k_norm", kv_heads)):
        weight = getattr(getattr(parent, child, None), "weight", None)
        # A norm with separate weights for each head, as in Cohere's models.
        if weight is not None and weight.ndim == 2 and weight.shape[0] == norm_heads and not whole:
            bounds = (
                (heads.kv_start, heads.kv_stop)
                if child == "k_norm"
                else (
                    heads.q_start,
                    heads.q_stop,
                )
            )
            _bare(work, f"{prefix}.{child}.weight", getattr(parent, child), "weight", *bounds)
    work.splits[layer] = parent.split = Split(heads, work.num_heads, kv_heads, whole, latent)
    if not whole:
        _set_counts(parent, work.num_heads, kv_heads, work.splits[layer])


def _set_counts(parent: Any, num_q: int, num_kv: int, split: Split) -> None:
    """Set this rank's counts of heads in modules that keep counts and reshape by them."""
    heads = split.heads
    for name, total, own in (
        ("num_heads", num_q, heads.num_q),
        ("num_attention_heads", num_q, heads.num_q),
        ("num_key_value_heads", num_kv, heads.num_kv),
        ("num_kv_heads", num_kv, heads.num_kv),
    ):
        if getattr(parent, name, None) == total:
            setattr(parent, name, own)
    if hasattr(parent, "num_key_value_groups"):
        # Uneven groups have no single number: code that still reads it must fail.
        del parent.num_key_value_groups
        if len(heads.runs) == 1:
            parent.num_key_value_groups = heads.num_q // heads.num_kv


def _unit(work: _Work, name: str, size: int, count: int) -> int:
    if size % count:
        raise work.refuse(
            f"the {size} rows or columns of {name} are not a multiple of its {count} heads"
        )
    return size // count


def _linear(work: _Work, prefix: str, child: str) -> Any:
    module = work.model.get_submodule(prefix)._modules.get(child)
    if type(module) is not nn.Linear:
        raise work.refuse(f"{prefix}.{child} is of type {type(module).__name__}, not Linear")
    return module


def _column(work: _Work, name: str, linear: Any, start: int, stop: int) -> None:
    new = ColumnLinear(linear.in_features, (stop - start,), linear.bias is not None)
    _put(work, name, new, new, {"weight": (0, start, stop), "bias": (0, start, stop)})


def _gathered(work: _Work, name: str, linear: Any, weight: nn.Parameter | None = None) -> None:
    size = linear.out_features
    block = -(-size // work.group.size)
    start = min(work.group.rank * block, size)
    if weight is None:
        weight = nn.Parameter(torch.empty(block, linear.in_features, device="meta"), False)
    new = LMHead(block, size, weight, work.group, linear.bias is not None)
    cut = (0, start, min(start + block, size))
    _put(work, name, new, new, {"weight": cut, "bias": cut})


def _row(work: _Work, name: str, linear: Any, start: int, stop: int) -> None:
    inner = RowLinear(stop - start, linear.out_features, linear.bias is not None)
    new = SummedRowLinear(inner, start, work.group)
    _put(work, name, new, inner, {"weight": (1, start, stop), "bias": None})


def _bare(work: _Work, name: str, module: nn.Module, kind: str, start: int, stop: int) -> None:
    """Keep the rows `[start, stop)` of a parameter that is not part of a Linear."""
    old = module._parameters[kind]
    assert old is not None
    module._parameters[kind] = nn.Parameter(old[start:stop], requires_grad=False)
    work.weights[name] = Weight(module, kind, tuple(old.shape), 0, start, stop)


def _put(
    work: _Work,
    name: str,
    new: nn.Module,
    holder: nn.Module,
    cuts: Mapping[str, tuple[int, int, int] | None],
) -> None:
    """Replace the module `name` by `new`; `holder` inside it has the parameters. A cut of None means a
    bias that only rank 0 adds, before the sum over the ranks."""
    old = work.model.get_submodule(name)
    for kind, cut in cuts.items():
        weight = work.weights.get(f"{name}.{kind}")
        if weight is None:
            continue  # there is no bias, or the weight is tied to one that is already sharded
        shape = weight.shape
        work.weights[f"{name}.{kind}"] = (
            Weight(holder, kind, shape, first=True)
            if cut is None
            else Weight(holder, kind, shape, *cut)
        )
    weight_of = getattr(old, "weight", None)
    assert weight_of is not None
    parent, _, child = name.rpartition(".")
    setattr(work.model.get_submodule(parent), child, new.to(weight_of.dtype))
