"""Tables of rotary frequencies against transformers, for many lengths, sizes and odd parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from base.errors import InputError
from kernels.rotary import rotate
from models.config import ModelConfig, Rope
from models.config_hf import from_hf
from models.rope import frequencies, rope_tables

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 1000)
HEADS = 4


def settings(kind: str, half: int) -> list[dict[str, Any]]:
    """Rotary settings as config.json has them, of heads with `half` frequencies."""
    match kind:
        case "linear":
            return [{"factor": factor} for factor in (1.0, 2.5, 8.0)]
        case "dynamic":
            return [{"factor": factor} for factor in (1.0, 2.0, 7.5)]
        case "llama3":
            return [
                {"factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                 "original_max_position_embeddings": 16}
                for factor, low, high in ((8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (1.5, 0.1, 0.3), (3, 2, 9))
            ]  # fmt: skip
        case "yarn":
            original = {"original_max_position_embeddings": 16, "factor": 4.0}
            more: list[dict[str, Any]] = [
                {},
                {"beta_fast": 4, "beta_slow": 2},
                {"truncate": False},
                {"truncate": False, "beta_fast": 3.0, "beta_slow": 3.0},
                {"attention_factor": 0.7},
                {"mscale": 0.707, "mscale_all_dim": 1.2},
                {"factor": 1.0},
                {"original_max_position_embeddings": 64, "factor": 1.1},
            ]
            return [original | each for each in more]
        case "longrope":
            own = {
                "short_factor": [1.0 + i / 7 for i in range(half)],
                "long_factor": [2.0 + i * i for i in range(half)],
                "original_max_position_embeddings": 16,
            }
            return [own, own | {"factor": 4.0}, own | {"attention_factor": 1.3}]
    return [{}]


@pytest.mark.parametrize("head_dim", [4, 6, 14, 64])
@pytest.mark.parametrize("theta", [100.0, 10000.0, 5e5])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_frequencies(kind: str, theta: float, head_dim: int) -> None:
    for values in settings(kind, head_dim // 2):
        parameters = {"rope_type": kind, "rope_theta": theta, **values}
        theirs = LlamaConfig(
            hidden_size=HEADS * head_dim,
            num_attention_heads=HEADS,
            head_dim=head_dim,
            max_position_embeddings=64,
            rope_parameters=dict(parameters),
        )
        ours = from_hf(
            {**theirs.to_dict(), "architectures": ["LlamaForCausalLM"], "rope_parameters": parameters},
            "here",
        ).rope
        for length in LENGTHS:
            wanted, scale = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
            found = frequencies(ours, head_dim, length)
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0, msg=f"{values} {length}")
            assert ours.attention_factor == pytest.approx(scale, rel=1e-6), values


SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
HALF = [1.0 + i / 5 for i in range(8)]
PHI3 = {"short_factor": HALF, "long_factor": [2 * each for each in HALF]}


def read(family: str = "Llama", **keys: Any) -> ModelConfig:
    return from_hf({"architectures": [f"{family}ForCausalLM"], **SIZES, **keys}, "here")


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": {"type": "yarn", **PHI3}},
        {"rope_scaling": {"type": "su", "original_max_position_embeddings": 4096, **PHI3}},
        {"rope_scaling": {"rope_type": "longrope", **PHI3}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "yarn", "type": "su", "rope_theta": 500.0, **PHI3}},
        # The key beside the object counts, or its default.
        {
            "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 7, **PHI3},
            "original_max_position_embeddings": 16,
        },
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 7, **PHI3}},
    ],
)
def test_phi3_calls_longrope_by_other_names(keys: dict[str, Any]) -> None:
    keys |= {"max_position_embeddings": 8192}
    theirs = Phi3Config(**SIZES, **copy.deepcopy(keys))
    ours = read("Phi3", **keys)
    assert ours.rope.kind == "longrope" and ours.max_seq_len == 8192
    parameters: Any = theirs.rope_parameters
    assert ours.rope.original_max_seq_len == parameters["original_max_position_embeddings"]
    for length in (4, 9, 20, 5000):
        wanted, scale = ROPE_INIT_FUNCTIONS["longrope"](theirs, torch.device("cpu"), seq_len=length)
        torch.testing.assert_close(frequencies(ours.rope, 16, length), wanted)
        assert ours.rope.attention_factor == pytest.approx(scale)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_theta": 700.0, "rope_local_base_freq": 300.0},
        {"rope_scaling": LINEAR},
        {"rope_parameters": {"full_attention": LINEAR}},
        {"rope_parameters": {"sliding_attention": LINEAR | {"rope_theta": 300.0}}},
        {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}, "rope_scaling": LINEAR},
    ],
)
def test_gemma3_has_rotary_embeddings_for_each_type_of_layer(keys: dict[str, Any]) -> None:
    theirs: Any = Gemma3TextConfig(**SIZES, **copy.deepcopy(keys)).rope_parameters
    ours = read("Gemma3", **keys)
    for rope, wanted in ((ours.rope, "full_attention"), (ours.local_rope, "sliding_attention")):
        assert rope is not None
        assert (rope.theta, rope.kind) == (theirs[wanted]["rope_theta"], theirs[wanted]["rope_type"])
        assert rope.factor == theirs[wanted].get("factor", 1.0)
    assert ours.max_seq_len == 131072  # which is stretched already


@pytest.mark.parametrize(
    ("family", "scaling", "match"),
    [
        ("Llama", {"type": "yarn", "factor": 2.0, **PHI3}, "'yarn' does not read long_factor, short_"),
        (
            "Llama",
            {"type": "linear", "factor": 2.0, "beta_fast": 9},
            "'linear' does not read beta_fast",
        ),
        ("Llama", {"type": "dynamic", "factor": 2.0, "alpha": 9.0}, "'dynamic' does not read alpha"),
        ("Llama", {"factor": 2.0}, "'default' does not read factor"),
        ("Llama", {"rope_type": "linear", "type": "yarn", "factor": 2.0}, "'linear' and 'yarn'"),
        ("Llama", {"rope_type": None, "factor": 2.0}, "'None' is not supported"),
        ("Llama", {"rope_type": ["linear"], "factor": 2.0}, "is not supported"),
        ("Llama", {"rope_type": "linear"}, "factor is missing"),
        ("Llama", {"rope_type": "yarn"}, "factor is missing"),
        ("Llama", {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        *[
            ("Llama", {"rope_type": kind, "factor": factor}, "factor must be a number above 0")
            for kind in ("linear", "dynamic", "yarn")
            for factor in ("2", float("nan"), float("inf"), -2.0, 0, True, [2.0])
        ],
        ("Llama", {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "true or false"),
        ("Phi3", {"type": "linear", "factor": 2.0}, "'linear' is not supported; supported: default, l"),
        ("Phi3", {"type": "yarn", "factor": 2.0}, "short_factor is missing"),
        ("Phi3", {"type": "su", **PHI3, "beta_slow": 2}, "'longrope' does not read beta_slow"),
        ("Phi3", {"type": "su", **PHI3, "short_factor": [1.0, float("nan")]}, "list of numbers"),
        ("Llama", {"full_attention": LINEAR, "sliding_attention": {}}, "same rotary embeddings in all"),
        ("Llama", {"full_attention": 3}, "same rotary embeddings in all"),
        ("Llama", [LINEAR], "must be an object"),
        ("Gemma3", {"full_attention": LINEAR}, "'default' does not read full_attention"),
    ],
)
def test_keys_that_a_kind_does_not_read_are_refused(family: str, scaling: Any, match: str) -> None:
    with pytest.raises(InputError, match=f"^here: .*{match}"):
        read(family, rope_scaling=scaling)


@pytest.mark.parametrize("parameters", [LINEAR, {"full_attention": LINEAR, "factor": 2.0}])
def test_gemma3_has_an_object_for_each_type_of_layer(parameters: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="an object for each of full_attention, sliding_attention"):
        read("Gemma3", rope_parameters=parameters)


def test_keys_that_change_nothing_are_left_alone() -> None:
    plain = read(rope_scaling=LINEAR, max_position_embeddings=64)
    more = {
        "original_max_position_embeddings": 64,
        "finetuned": True,
        "attention_factor": 1.0,
        "beta_fast": None,
    }
    assert read(rope_scaling=LINEAR | more, max_position_embeddings=64) == plain
    both = dict.fromkeys(("full_attention", "sliding_attention"), LINEAR)
    assert read(rope_parameters=both, max_position_embeddings=64) == plain
    # As transformers has it, the older name counts before the newer.
    other = {"rope_type": "default", "rope_theta": 7.0}
    assert read(rope_scaling=LINEAR, rope_parameters=other, max_position_embeddings=64) == plain


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 64),
        ({"type": "linear", "factor": 4.0}, 256),
        ({"type": "linear", "factor": 0.5}, 64),
        ({"type": "dynamic", "factor": 2.5}, 160),
        ({"type": "yarn", "factor": 4.0}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        (
            {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 16},
            64,
        ),
        ({"type": "longrope", "original_max_position_embeddings": 16, **PHI3}, 64),
    ],
)  # fmt: skip
def test_a_stretched_context_is_as_long_as_it_was_stretched(scaling: Any, length: int) -> None:
    assert read(rope_scaling=scaling, max_position_embeddings=64).max_seq_len == length


def test_part_of_a_head_has_the_frequencies_of_that_part() -> None:
    rope = Rope(theta=1e4, dim=6, kind="linear", factor=2.0)
    wanted = 1e4 ** (-torch.arange(0, 6, 2) / 6) / 2
    torch.testing.assert_close(frequencies(rope, 16, 10), wanted)
    cos, sin = rope_tables(rope, 16, 10)
    assert cos.shape == sin.shape == (10, 3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distances_alone(interleaved: bool) -> None:
    """And the numbers that are not rotated stay as they are."""
    rope = Rope(dim=6, attention_factor=1.25)
    cos, sin = rope_tables(rope, 10, 50)
    q, k = torch.randn(2, 1, 1, 1, 10)

    def score(i: int, j: int) -> float:
        left = rotate(q, cos[i][None, None], sin[i][None, None], interleaved)
        right = rotate(k, cos[j][None, None], sin[j][None, None], interleaved)
        assert torch.equal(left[..., 6:], q[..., 6:])
        return float((left * right)[..., :6].sum())

    assert score(40, 33) == pytest.approx(score(9, 2), rel=1e-4, abs=1e-5)
    assert score(7, 7) == pytest.approx(1.25**2 * float((q * k)[..., :6].sum()), rel=1e-4, abs=1e-5)
    assert score(40, 33) != pytest.approx(score(40, 34), rel=1e-3)
