"""A model's dimensions, and the names and shapes of its weights.

A family is a set of flags here, not a class: `block` names the file that defines its layers, and the
other fields say what the layers contain. The numbers come from `models.presets`, `models.config_hf`
(config.json) or `models.config_gguf`. Free of torch, so that the launcher can refuse a job before it
starts a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from base.errors import InputError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # absent where the embedding is also the head (tied)
OVERRIDES = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
# More than any model has. Values from a file are checked before they are looped over or computed with.
MAX_LAYERS, MAX_EXPERTS, MAX_FACTOR = 10_000, 1 << 14, 1e6
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings. The first `dim` numbers of a head are rotated (0: all). A pair is a number of
    each half or, if `interleaved`, two neighbors. `kind` says how frequencies are scaled for contexts
    longer than `original_max_seq_len` tokens, by `factor`; each other field belongs to one kind
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
    """Dimensions of a decoder. `max_seq_len`: the context length of training, after any scaling.

    block: "llama" (attention, then MLP), "gemma" (the same, with a norm after each too), "parallel"
    (attention and MLP side by side). norm: "rms", "rms1p" (stored weights are less by 1), "layer".
    activation: "silu", "gelu", "gelu_tanh". Biases: of query, key and value; of attention's output; of
    the MLP; of the head. `qk_norm`: query and key heads are normalized. `two_norms`: the MLP of a
    parallel block has its own norm.
    window: the number of tokens that a layer in `windowed` (empty: every layer) attends to, 0 for no
    limit; `local_rope` holds for those layers. `no_rope`: layers without rotary embeddings.
    Scales multiply (0 in `attention_scale`: head_dim ** -0.5); caps are c * tanh(x / c), 0 for none.
    Experts: all layers but `dense_layers` have `num_experts` MLPs of width `expert_dim`, and the
    router picks `experts_per_token` of them; `norm_topk`: the picked weights are scaled to sum to 1.
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
        """The longest run, in tokens, that leaves the rotary frequencies unscaled; None if they do not
        depend on the length of the run (see `models.rope`)."""
        ropes = (self.rope, *filter(None, [self.local_rope]))
        lengths = [r.original_max_seq_len for r in ropes if r.kind in ("dynamic", "longrope")]
        return min(lengths, default=None)

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers


def from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, for a dictionary that went through JSON."""

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
    """`config` with the given dimensions (None keeps a dimension). Raises InputError if they do not
    fit together."""
    given = {name: value for name, value in changes.items() if value is not None}
    changed = replace(config, **given)  # type: ignore[arg-type]
    if "dim" in given or "num_heads" in given:
        changed = replace(changed, head_dim=head_dim_of(changed.dim, changed.num_heads))
    return check(changed)


def check(config: ModelConfig) -> ModelConfig:
    """Returns `config` if it is valid. Raises InputError if it is not."""
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
            f"head_dim={head_dim}, rotary dim={rope.dim}: rotary embeddings need even sizes, and the "
            "rotary dim must be at most head_dim"
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
                f"longrope has {len(factors)} {name} factors; {half} frequencies need one each"
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
    """The context length of a model whose file says `trained`. With linear and dynamic scaling a file
    states the length before scaling. With yarn it states either, so the original length times the
    factor counts. With llama3 and longrope it states the length after scaling."""
    original = {"linear": trained, "dynamic": trained, "yarn": rope.original_max_seq_len}
    return max(trained, int(original.get(rope.kind, 0) * min(rope.factor, MAX_FACTOR)))


def head_dim_of(dim: int, num_heads: int) -> int:
    """The width of one head, dim / num_heads. Raises InputError if that is not a whole number."""
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"dim={dim} is not a multiple of num_heads={num_heads}")
    return dim // num_heads


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The canonical names of all weights of a model, with their full (unsharded) shapes."""
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
