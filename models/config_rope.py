"""The rotary settings of a `config.json` -> `models.config.Rope`. Pure; free of torch.

Newer files keep the settings in one object, `rope_parameters` (or one object per type of layer). Older
files keep them in `rope_scaling`, with the base frequency outside it. A key that its kind does not read
belongs to another kind, so the file probably names the wrong kind: it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from base.errors import InputError
from models.config import ROPE_KINDS, Rope, stretched_length
from models.defaults import ROPE_DEFAULTS, ROPE_NEUTRAL
from models.keys import Keys

LAYER_TYPES = ("full_attention", "sliding_attention")
# The kinds by their names in files. Phi-3 has only two; its first files call longrope "su" or "yarn".
KINDS = {kind: kind for kind in ROPE_KINDS} | {"su": "longrope"}
PHI3_KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def read_rope(keys: Keys, head_dim: int, kinds: Mapping[str, str] = KINDS) -> dict[str, Any]:
    """The fields `rope` and `max_seq_len` of a model with the same rotary embeddings in all layers.
    Raises InputError for settings that are not supported."""
    settings = _object(keys, "rope_scaling") or _object(keys, "rope_parameters")
    by_type = [settings[kind] for kind in LAYER_TYPES if settings.get(kind) is not None]
    if by_type:
        if not isinstance(by_type[0], Mapping) or any(each != by_type[0] for each in by_type):
            raise InputError(
                f"{keys.source}: rope_parameters differ between types of layers, {settings!r}; this "
                "class has the same rotary embeddings in all layers"
            )
        settings = by_type[0]
    rope = _rope(keys, settings, head_dim, "rope_theta", kinds)
    return {
        "rope": rope,
        "max_seq_len": stretched_length(rope, keys.integer("max_position_embeddings")),
    }


def read_ropes(keys: Keys, head_dim: int) -> dict[str, Any]:
    """As `read_rope`, for Gemma 3, with `local_rope` for layers with a window. Its files hold the
    context length after scaling."""
    settings = _object(keys, "rope_parameters")
    if set(settings) - set(LAYER_TYPES):
        raise InputError(
            f"{keys.source}: rope_parameters must be an object for each of {', '.join(LAYER_TYPES)}, "
            f"not {settings!r}"
        )
    parts = Keys(settings, f"{keys.source}: rope_parameters", dict.fromkeys(LAYER_TYPES))
    whole = {**_object(parts, "full_attention"), **_object(keys, "rope_scaling")}
    return {
        "rope": _rope(keys, whole, head_dim, "rope_theta"),
        "local_rope": _rope(
            keys, _object(parts, "sliding_attention"), head_dim, "rope_local_base_freq"
        ),
        "max_seq_len": keys.integer("max_position_embeddings"),
    }


def _object(keys: Keys, key: str) -> Mapping[str, Any]:
    value = keys.value(key)
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{keys.source}: {key}, rotary settings, must be an object, not {value!r}")
    return value or {}


def _rope(
    keys: Keys,
    values: Mapping[str, Any],
    head_dim: int,
    theta: str,
    kinds: Mapping[str, str] = KINDS,
) -> Rope:
    """`theta`: the key of the base frequency to use if the object has none."""
    kind = _kind(keys, values, kinds)
    own = Keys(values, f"{keys.source}: rotary scaling {kind!r}", ROPE_DEFAULTS[kind])
    trained = keys.integer("max_position_embeddings")
    _refuse_unread(own, trained)
    beside = keys.value("partial_rotary_factor")
    share = own.number("partial_rotary_factor", 1.0 if beside is None else beside)
    if share != 1 and keys.defaults["partial_rotary_factor"] is None:
        raise InputError(
            f"{keys.source}: partial_rotary_factor={share:g}: this class rotates whole heads"
        )
    if not 1 <= head_dim * share <= head_dim:
        raise InputError(
            f"{keys.source}: partial_rotary_factor={share:g}, head_dim={head_dim}: the product must be "
            "from 1 to head_dim"
        )
    plain = Rope(
        theta=own.number("rope_theta", keys.number(theta)),
        dim=0 if share == 1 else int(head_dim * share),
        kind=kind,
    )
    if kind == "default":
        return plain
    if kind == "linear":
        return replace(plain, factor=own.number("factor"))
    if kind == "dynamic":  # scaled for lengths beyond the trained one
        return replace(plain, factor=own.number("factor"), original_max_seq_len=trained)
    # The key outside the object takes precedence over the one inside.
    original = keys.integer(
        "original_max_position_embeddings", own.integer("original_max_position_embeddings", trained)
    )
    more = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}[kind]
    ratio = max(trained / max(original, 1), 1.0)
    return replace(plain, original_max_seq_len=original, **more(own, ratio, original))


def _kind(keys: Keys, values: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    given = {values[key] if isinstance(values[key], str) else repr(values[key])
             for key in ("type", "rope_type") if key in values} or {"default"}  # fmt: skip
    found = {kinds.get(name) for name in given}
    if len(found) > 1 or None in found:
        raise InputError(
            f"{keys.source}: rotary scaling {' and '.join(map(repr, sorted(given)))} is not supported; "
            f"supported: {', '.join(kinds)}"
        )
    (kind,) = found
    assert kind is not None
    return kind


def _refuse_unread(own: Keys, trained: int) -> None:
    neutral = ROPE_NEUTRAL | {"original_max_position_embeddings": trained}
    unread = [
        key
        for key, value in own.values.items()
        if key not in own.defaults
        and key not in ("type", "rope_type")
        and value is not None
        and not (key in neutral and neutral[key] in (None, value))
    ]
    if unread:
        raise InputError(
            f"{own.source} does not read {', '.join(sorted(map(str, unread)))}: correct its rope_type, "
            "or take them out"
        )


def _llama3(own: Keys, ratio: float, original: int) -> dict[str, Any]:
    return {key: own.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}


def _yarn(own: Keys, ratio: float, original: int) -> dict[str, Any]:
    factor = own.number("factor", ratio)

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    # The temperature that YaRN folds into cos and sin; DeepSeek's `mscale` keys change it.
    attention = scale(1)
    if own.value("attention_factor") is not None:
        attention = own.number("attention_factor")
    elif own.value("mscale") and own.value("mscale_all_dim"):
        attention = scale(own.number("mscale")) / scale(own.number("mscale_all_dim"))
    return {
        "factor": factor,
        "attention_factor": attention,
        "beta_fast": own.number("beta_fast", 32),
        "beta_slow": own.number("beta_slow", 1),
        "truncate": own.flag("truncate"),
    }


def _longrope(own: Keys, ratio: float, original: int) -> dict[str, Any]:
    factor, attention = own.number("factor", ratio), 1.0
    if own.value("attention_factor") is not None:
        attention = own.number("attention_factor")
    elif factor > 1 and original > 1:
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factor": factor,
        "attention_factor": attention,
        "short_factors": own.numbers("short_factor"),
        "long_factors": own.numbers("long_factor"),
    }
