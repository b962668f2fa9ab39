"""Keys that config.json leaves out, against the defaults of transformers' configuration classes."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import InputError
from models import config_gguf, config_hf, config_rope
from models.config import ModelConfig
from models.config_hf import ARCHITECTURES, from_hf
from models.defaults import ALIASES, DEFAULTS, ROPE_DEFAULTS, gguf_defaults
from models.keys import REQUIRED
from tests.models import families
from tests.running import RunRanks

# Keys that are no fields of a class: rotary settings, and what it takes from any file that has them.
NOT_FIELDS = {
    "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "rope_local_base_freq", "sliding_window_pattern", "head_dim", "layer_types",
}  # fmt: skip

# With null they are computed or false, also where a class of today refuses it; with null in the others
# a class gives no model that we have, although it takes it.
COMPUTED = {
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "original_max_position_embeddings",
}  # fmt: skip
UNUSABLE = {"activation", "layer_norm_epsilon", "parallel_attn"}


def config_class(architecture: str) -> Any:
    """transformers' class for the architecture of a file."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Some other types have this class, too; Gemma 3's own is that of text.
    types = [t for t, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]
    found = [CONFIG_MAPPING[each] for each in types]
    family = architecture.removesuffix("ForCausalLM")
    (own,) = (each for each in found if each.__name__ in (f"{family}Config", f"{family}TextConfig"))
    return own


def written(architecture: str, **values: Any) -> dict[str, Any]:
    """All keys of the class's configuration, as it writes them today."""
    config = config_class(architecture)(**values)
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": [architecture]}


def read(architecture: str, **values: Any) -> ModelConfig:
    return from_hf({"architectures": [architecture], **values}, "here")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_those_of_the_class(architecture: str) -> None:
    found = config_class(architecture)
    fields = {field.name: field.default for field in dataclasses.fields(found)}
    ours = DEFAULTS[architecture]
    for key in ours.keys() & fields.keys():
        assert ours[key] == fields[key] and type(ours[key]) is type(fields[key]), key
    assert ours.keys() - fields.keys() <= NOT_FIELDS
    for key in ("rope_scaling", "head_dim", "layer_types", "original_max_position_embeddings"):
        assert key in fields or ours.get(key) is None, key
    theta = found.default_theta
    if isinstance(theta, dict):
        assert (ours["rope_theta"], ours["rope_local_base_freq"]) == (theta["global"], theta["local"])
    elif architecture != "GPTJForCausalLM":
        assert ours["rope_theta"] == theta
    pairs = {frozenset(pair) for pair in found.attribute_map.items()}
    assert {frozenset(pair) for pair in ALIASES.get(architecture, {}).items()} == pairs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_without_keys_is_the_class_without_arguments(architecture: str) -> None:
    """Also the defaults that a class computes from other keys; and one key left out at a time."""
    sizes = {"num_hidden_layers": 9} if "GPTJ" not in architecture else {"n_layer": 9}
    for more in ({}, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}):
        if more and "use_sliding_window" not in DEFAULTS[architecture]:
            continue
        whole = written(architecture, **sizes, **more)
        wanted = from_hf(whole, "here")
        assert read(architecture, **sizes, **more) == wanted
        for key in DEFAULTS[architecture].keys() - sizes.keys() - more.keys():
            if key not in ("num_hidden_layers", "layer_types", "no_rope_layers"):
                left = {name: value for name, value in whole.items() if name != key}
                assert from_hf(left, "here") == wanted, key


# Sizes with which a model is small; whatever is left out must be what the class says.
SMALL = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 48}
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2": {"hidden_size": 128, "num_attention_heads": 32},
    "Qwen3": {"num_attention_heads": 32},
    "Gemma3": {"num_hidden_layers": 7},
    "SmolLM3": {"num_hidden_layers": 5},
    "Qwen3Moe": {"num_experts": 16, "moe_intermediate_size": 16},
}
GPTJ_SIZES = {"n_embd": 128, "n_head": 2, "n_layer": 2}


@pytest.mark.slow
def test_models_of_files_with_sizes_alone(tmp_path: Path, run_ranks: RunRanks) -> None:
    """Their logits, against transformers on the same folder, on 1 and 2 ranks."""
    folders = {}
    for architecture in ARCHITECTURES:
        family = architecture.removesuffix("ForCausalLM")
        sizes: dict[str, Any] = GPTJ_SIZES if family == "GPTJ" else SMALL | SIZES.get(family, {})
        sizes = sizes | {"vocab_size": 301, "pad_token_id": None}
        folder = tmp_path / family
        model = families.build(family, sizes | {"initializer_range": 0.2})
        model.save_pretrained(folder)
        keys = {"architectures": [architecture], "model_type": model.config.model_type, **sizes}
        (folder / "config.json").write_text(json.dumps(keys))
        torch.save(families.wanted(type(model).from_pretrained(folder).eval()), folder / "wanted.pt")
        folders[family] = str(folder)
    code, out, err = run_ranks("families", 2, "shm", folders=folders, sizes=[1, 2])
    assert code == 0, err
    assert out.splitlines() == [f"{size} {family}" for size in (1, 2) for family in folders]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_null(architecture: str) -> None:
    """Means "none" or "computed" where the class says so, and is refused where it does not."""
    fields = {field.name for field in dataclasses.fields(config_class(architecture))}
    used = {"use_sliding_window": True} if "use_sliding_window" in fields else {}
    for key in fields & {key for key, value in DEFAULTS[architecture].items() if value is not False}:
        values = used | {key: None}
        try:
            whole = written(architecture, **values)
        except Exception:
            whole = None
        if key in COMPUTED:
            assert read(architecture, **values)
        elif whole is None or key in UNUSABLE:
            with pytest.raises(InputError, match=rf"^here: .*({key}|Falcon)"):
                read(architecture, **values)
        else:
            assert read(architecture, **values) == from_hf(whole, "here"), key


def test_every_key_that_is_read_has_an_entry_and_every_entry_is_read() -> None:
    """`Keys` itself fails for a key that the family's table lacks, but only where it is read."""
    tables = {
        config_hf: {key for table in DEFAULTS.values() for key in table},
        config_rope: {key for table in ROPE_DEFAULTS.values() for key in table},
        config_gguf: set(gguf_defaults("")),
    }
    named = {module: _names(Path(module.__file__ or "")) for module in tables}
    for module, keys in tables.items():
        left = {key for key in keys if key.removeprefix("attention.") not in named[module]}
        assert left <= named[module] | named[config_rope], left
    known = set().union(*tables.values(), config_rope.LAYER_TYPES)
    for module in tables:
        assert _read(Path(module.__file__ or "")) <= known | {"rope_scaling"}


def _names(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def _read(file: Path) -> set[str]:
    """The first argument of each call `keys.something("key")`."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("keys", "own")
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def test_other_names_of_keys() -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 8}
    others = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    others |= {"max_position_embeddings": 32, "rotary_dim": 8}
    assert read("GPTJForCausalLM", **sizes) == read("GPTJForCausalLM", **others)
    assert read("MixtralForCausalLM", num_experts=3).num_experts == 3
    assert read("Qwen3MoeForCausalLM", num_local_experts=9).num_experts == 9


@pytest.mark.parametrize(
    ("architecture", "keys", "match"),
    [
        ("LlamaForCausalLM", {"attention_bias": "false"}, "attention_bias must be true or false"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "this class rotates whole heads"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0}, "a number above 0, not 0"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 1.5}, "the product must be from 1 to head_dim"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.001}, "the product must be from 1 to head_dim"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 32}, "layer_types contradict"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "one for each of 26 layers"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "an entry for each layer"),
    ],
)
def test_refused_by_name(architecture: str, keys: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=f"^here.*{match}"):
        read(architecture, **keys)


ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 1 << 40, 1 << 63, 0.0, -2.5, 1e-320, 1e308, float("nan"),
    float("inf"), "", "yarn", [], [1], ["x"], [[1]], [float("nan")] * 8, {}, {"factor": 2.0},
    {"full_attention": {}, "sliding_attention": []},
)  # fmt: skip


def outcome(architecture: str, **keys: Any) -> ModelConfig | str:
    try:
        return read(architecture, **keys)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_value_of_any_key(architecture: str) -> None:
    """A model, or a message."""
    sizes = {"num_hidden_layers": 2, "n_layer": 2, "use_sliding_window": True}
    outcomes: list[ModelConfig | str] = []
    for key in DEFAULTS[architecture]:
        for value in ODD:
            outcomes.append(outcome(architecture, **sizes | {key: value}))
    for kind, table in ROPE_DEFAULTS.items():
        plain = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        plain |= {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
        plain = {key: value for key, value in plain.items() if key in (*table, "rope_type")}
        for key in (*table, "rope_type", "type"):
            for value in ODD:
                outcomes.append(outcome(architecture, **sizes, rope_scaling=plain | {key: value}))
    configs = {found for found in outcomes if isinstance(found, ModelConfig)}
    assert len(configs) > 5 and len(set(outcomes) - configs) > 50


@pytest.mark.parametrize("name", ["llama", "granite", "falcon", "gemma3"])
def test_what_llama_cpp_requires_of_gguf(name: str) -> None:
    required = {key for key, value in gguf_defaults(name).items() if value is REQUIRED}
    assert ("logit_scale" in required) == (name == "granite")
    keys: dict[str, Any] = dict.fromkeys(required, 8) | {"expert_count": 2, "vocab_size": 40}
    keys |= {"attention.head_count": 2, "expert_used_count": 1}
    norms = {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"}
    norms.remove(f"attention.layer_norm_{'' if name == 'falcon' else 'rms_'}epsilon")

    def config_without(*left: str) -> ModelConfig:
        values = {f"{name}.{key}": value for key, value in keys.items() if key not in left}
        return config_gguf.from_gguf({"general.architecture": name, **values}, (), "here")

    config_without(*norms)
    for key in required - norms:
        with pytest.raises(InputError, match=f"{key} is missing"):
            config_without(key)
