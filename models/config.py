"""What a model's dimensions are, and the weights that follow from them.

A family is a set of flags here, not a class of its own: `block` names the file that holds the shape of
its layers, the other fields say what is in them. Where the numbers come from: `models.presets`,
`models.config_hf` (config.json), `models.config_gguf`. Free of torch, so that the launcher's side can
refuse a job before any rank is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from base.errors import InputError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # absent where the embedding serves as the head
OVERRIDES = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
# More than any model has: what a file says is not believed before it is looped over or computed with.
MAX_LAYERS, MAX_EXPERTS, MAX_FACTOR = 10_000, 1 << 14, 1e6
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings: the first `dim` numbers of a head are rotated (0 for all), as two halves or,
    `interleaved`, as neighbors. `kind` is how frequencies are stretched for long contexts, by
    `factor` over `original_max_seq_len` tokens; the other fields belong to one kind each
    (`models.rope` has the formulas). `attention_factor` scales cos and sin.
    """

    theta: float = 10000.0
    dim: int = 0
    interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    original_max_seq_len: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder. `max_seq_len`: what the model was trained for, or stretched to.

    block: "llama" (attention, then MLP), "gemma" (the same with norms behind each), "parallel" (side by
    side). norm: "rms", "rms1p" (weights stored less 1), "layer". activation: "silu", "gelu",
    "gelu_tanh". Biases: of query, key and value; of attention's output; of the MLP; of the head.
    `qk_norm`: norms of query and key heads. `two_norms`: a parallel block's MLP has a norm of its own.
    window: how many tokens a layer of `windowed` sees (no entries: all layers), 0 for no limit;
    `local_rope` is those layers' own. `no_rope`: layers without rotary embeddings.
    Scales multiply (0 in `attention_scale`: head_dim ** -0.5), caps are c * tanh(x / c), 0 for none.
    Experts: `num_experts` MLPs of width `expert_dim` in all layers but `dense_layers`, of which the
    router picks `experts_per_token`; `norm_topk`: their weights are made to add up to one.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    block: str = "llama"
    norm: str = "rms"
    activation: str = "silu"
    gated: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    two_norms: bool = False
    window: int = 0
    windowed: tuple[int, ...] = ()
    local_rope: Rope | None = None
    no_rope: tuple[int, ...] = ()
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logits_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_dim: int = 0
    norm_topk: bool = True
    dense_layers: tuple[int, ...] = ()

    def is_windowed(self, layer: int) -> bool:
        return self.window > 0 and (not self.windowed or layer in self.windowed)

    @property
    def stretched_from(self) -> int | None:
        """Of rotary embeddings that depend on the room that a run has (see `models.rope`): the most
        tokens that leave them as they are; None of others."""
        ropes = (self.rope, *filter(None, [self.local_rope]))
        lengths = [r.original_max_seq_len for r in ropes if r.kind in ("dynamic", "longrope")]
        return min(lengths, default=None)

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers


def from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, after a way through JSON."""

    def rope(values: Mapping[str, Any]) -> Rope:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return Rope(**fields)

    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    values["rope"] = rope(data["rope"])
    if data["local_rope"] is not None:
        values["local_rope"] = rope(data["local_rope"])
    return ModelConfig(**values)


def override(config: ModelConfig, **changes: int | None) -> ModelConfig:
    """`config` with the given dimensions (None keeps one). Raises InputError if they do not fit."""
    given = {name: value for name, value in changes.items() if value is not None}
    changed = replace(config, **given)  # type: ignore[arg-type]
    if "dim" in given or "num_heads" in given:
        changed = replace(changed, head_dim=head_dim_of(changed.dim, changed.num_heads))
    return check(changed)


def check(config: ModelConfig) -> ModelConfig:
    """`config`, if a model can have it. Raises InputError."""
    may_be_zero = ("window", "num_experts", "experts_per_token", "expert_dim")
    sizes = {name: value for name, value in vars(config).items() if type(value) is int}
    for name, value in sizes.items():
        if value < (0 if name in may_be_zero else 1):
            raise InputError(f"{name}={value}: it must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}"
        )
    if config.num_experts and not 1 <= config.experts_per_token <= config.num_experts:
        raise InputError(
            f"experts_per_token={config.experts_per_token}: must be between 1 and the number of "
            f"experts, {config.num_experts}"
        )
    for rope in (config.rope, config.local_rope):
        if rope is not None:
            _check_rope(rope, config.head_dim)
    return config


def _check_rope(rope: Rope, head_dim: int) -> None:
    if head_dim % 2 or rope.dim % 2 or not 0 <= rope.dim <= head_dim:
        raise InputError(
            f"head_dim={head_dim}, rotary dim={rope.dim}: rotary embeddings need an even size, within "
            "the head's"
        )
    if rope.kind not in ROPE_KINDS:
        raise InputError(
            f"rotary scaling {rope.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    if rope.theta <= 1:
        raise InputError(f"a rotary base of {rope.theta:g}: it must be above 1")
    for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
        if not 1 / MAX_FACTOR <= getattr(rope, name) <= MAX_FACTOR:
            raise InputError(
                f"rotary scaling {rope.kind!r} with {name}={getattr(rope, name):g}: it must be between "
                f"{1 / MAX_FACTOR:g} and {MAX_FACTOR:g}"
            )
    half = (rope.dim or head_dim) // 2
    for name, factors in (("short", rope.short_factors), ("long", rope.long_factors)):
        if rope.kind == "longrope" and len(factors) != half:
            raise InputError(
                f"longrope has {len(factors)} {name} factors; {half} frequencies need as many"
            )
    if rope.kind in ("llama3", "yarn", "longrope") and rope.original_max_seq_len < 1:
        raise InputError(
            f"rotary scaling {rope.kind!r} needs original_max_position_embeddings, at least 1"
        )
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise InputError(
            f"rotary scaling 'llama3': low_freq_factor={rope.low_freq_factor} must be below "
            f"high_freq_factor={rope.high_freq_factor}"
        )


def stretched_length(rope: Rope, trained: int) -> int:
    """How many tokens a model has room for whose file says `trained`. Of linear and dynamic scaling
    that is the length before the factor, of yarn either, so the original length times the factor
    counts; of llama3 and longrope the length after it."""
    original = {"linear": trained, "dynamic": trained, "yarn": rope.original_max_seq_len}
    return max(trained, int(original.get(rope.kind, 0) * min(rope.factor, MAX_FACTOR)))


def head_dim_of(dim: int, num_heads: int) -> int:
    """What each head has of `dim`. Raises InputError."""
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"dim={dim} is not a multiple of num_heads={num_heads}")
    return dim // num_heads


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and full shapes of all weights of a model."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.dim)}

    def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        if bias:
            shapes[f"{name}.bias"] = (out_features,)

    def norm(name: str, size: int = config.dim) -> None:
        shapes[f"{name}.weight"] = (size,)
        if config.norm == "layer":
            shapes[f"{name}.bias"] = (size,)

    def mlp(name: str, width: int) -> None:
        if config.gated:
            linear(f"{name}.gate_proj", width, config.dim, config.mlp_bias)
        linear(f"{name}.up_proj", width, config.dim, config.mlp_bias)
        linear(f"{name}.down_proj", config.dim, width, config.mlp_bias)

    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm")
        linear(f"{layer}.self_attn.q_proj", q, config.dim, config.attention_bias)
        linear(f"{layer}.self_attn.k_proj", kv, config.dim, config.attention_bias)
        linear(f"{layer}.self_attn.v_proj", kv, config.dim, config.attention_bias)
        linear(f"{layer}.self_attn.o_proj", config.dim, q, config.attention_out_bias)
        if config.qk_norm:
            norm(f"{layer}.self_attn.q_norm", config.head_dim)
            norm(f"{layer}.self_attn.k_norm", config.head_dim)
        if config.block == "parallel":
            if config.two_norms:
                norm(f"{layer}.mlp_layernorm")
        else:
            norm(f"{layer}.post_attention_layernorm")
        if config.block == "gemma":
            norm(f"{layer}.pre_feedforward_layernorm")
            norm(f"{layer}.post_feedforward_layernorm")
        if config.has_experts(i):
            linear(f"{layer}.mlp.gate", config.num_experts, config.dim, False)
            for expert in range(config.num_experts):
                mlp(f"{layer}.mlp.experts.{expert}", config.expert_dim)
        else:
            mlp(f"{layer}.mlp", config.ffn_dim)
    norm("model.norm")
    if not config.tie_embeddings:
        linear("lm_head", config.vocab_size, config.dim, config.head_bias)
    return shapes
