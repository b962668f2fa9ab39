"""Models that hold bfloat16 weights packed: the same logits, nothing held twice, any ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import models.load_quant
import tp.layers
from comm.group import Group
from kernels.load import load_kernels
from models.config import ModelConfig, expected_shapes
from models.load import load_model
from tests.running import RunRanks
from tests.targets.packed import logits_of
from weights.formats.random_io import random_checkpoint

assert load_kernels()
ALONE = Group(0, 1)
# Columns that are whole steps, and others; a vocabulary that no number of panels divides.
CONFIGS = [
    ModelConfig(192, 2, 6, 3, 32, 384, 131, 256, tie_embeddings=True),
    ModelConfig(200, 2, 5, 1, 20, 310, 131, 256, tie_embeddings=False, attention_bias=True),
]


def wanted_of(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """The logits in float32, and how far bfloat16 may be from them: twice as far as it is unpacked."""
    exact = logits_of(config, ALONE, torch.float32, packed=True)
    plain = logits_of(config, ALONE, torch.bfloat16, packed=False)
    off = float((plain - exact).abs().max())
    assert 0 < off < 0.03 * float(exact.abs().max())
    return exact, 2 * off


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_are_those_of_plain_weights(config: ModelConfig) -> None:
    wanted, tolerance = wanted_of(config)
    found = logits_of(config, ALONE, torch.bfloat16, packed=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_ranks_compute_what_one_computes(tmp_path: Path, run_ranks: RunRanks) -> None:
    torch.save([(config, *wanted_of(config)) for config in CONFIGS], tmp_path / "cases.pt")
    code, _, err = run_ranks("packed", 2, file=str(tmp_path / "cases.pt"))
    assert code == 0, err


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_is_held_twice(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor longer than it is being read: a rank's tensors are its part and what fills panels up."""
    sizes = {}
    for packed in (False, True):
        monkeypatch.setattr(tp.layers, "prefers_packed", lambda packed=packed: packed)
        checkpoint = random_checkpoint(expected_shapes(config), 3)
        model = load_model(config, checkpoint, Group(1, 2), torch.bfloat16)
        sizes[packed] = sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
    assert sizes[False] <= sizes[True] <= 1.3 * sizes[False]  # small weights, so padding shows


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_made_in_blocks_is_what_is_made_at_once(
    config: ModelConfig, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where blocks end inside a panel; the progress counts every byte that is filled."""
    monkeypatch.setattr(tp.layers, "prefers_packed", lambda: packed)
    states, counts = [], []
    for size in (1 << 30, 7 * config.dim * 4):
        monkeypatch.setattr(models.load_quant, "PLAIN_BYTES", size)
        checkpoint, steps = random_checkpoint(expected_shapes(config), 3), list[tuple[int, int]]()
        add = lambda done, total, steps=steps: steps.append((done, total))  # noqa: E731
        model = load_model(config, checkpoint, Group(1, 2), torch.bfloat16, add)
        states.append({**dict(model.named_parameters()), **dict(model.named_buffers())})
        counts.append(steps)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert counts[0][-1] == counts[1][-1] and counts[1][-1][0] == counts[1][-1][1]
    assert len(counts[1]) > 2 * len(counts[0]) and counts[1] == sorted(counts[1])


def test_where_it_is_not_preferred_or_not_bfloat16_weights_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for packed, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        monkeypatch.setattr(tp.layers, "prefers_packed", lambda packed=packed: packed)
        checkpoint = random_checkpoint(expected_shapes(CONFIGS[0]), 3)
        model = load_model(CONFIGS[0], checkpoint, ALONE, dtype)
        assert model.head.packing is None
        assert model.head.weight is model.embed.weight
        assert not list(model.buffers())
