"""Tables of rotary frequencies against transformers, for many lengths, sizes and odd parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kernels.rotary import rotate
from models.config import Rope
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
