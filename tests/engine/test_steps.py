"""Compiled steps: each runner's are of its own model, although no guard looks at models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comm.group import Group
from engine.steps import GREEDY, Runner, make_runner
from models.config import ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import load_model
from models.presets import PRESETS
from weights.random_io import random_checkpoint

ALONE = Group(0, 1)


def pair(config: ModelConfig) -> tuple[Decoder, Runner, Runner]:
    """A model, its compiled runner, and the plain one of the same weights."""
    weights = random_checkpoint(expected_shapes(config), 1)
    models = [load_model(config, weights, ALONE, torch.float32) for _ in range(2)]
    compiled, plain = (
        make_runner(model, ALONE, 32, compiled, num_rows=2)
        for model, compiled in zip(models, (True, False), strict=True)
    )
    return models[0], compiled, plain


@torch.no_grad()
def texts(runner: Runner) -> list[list[int]]:
    tokens, positions = torch.tensor([3, 5]), torch.tensor([0, 1])
    made = []
    for _ in range(6):
        tokens = runner.steps[GREEDY](tokens, positions).clone()
        positions += 1
        made.append(tokens.tolist())
    return made


@pytest.mark.slow
def test_two_models_in_one_process() -> None:
    # Alike in all that a step's arguments tell; their graphs differ in depth and in numbers.
    large = PRESETS["tiny"]
    pairs = [pair(large), pair(replace(large, num_layers=1, embedding_scale=3.0))]
    found = [[texts(runner) for runner in runners] for _, *runners in pairs]
    for compiled, plain in found:
        assert compiled == plain
    assert found[0] != found[1]
    # What an argument may be is still looked at: another number of rows is another graph.
    both, (model, compiled, _) = torch.tensor([3, 5]), pairs[0]
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        compiled.steps[GREEDY](both, both.clone())
        with pytest.raises(RuntimeError, match="recompile"):
            compiled.steps[GREEDY](both[:1], both[:1].clone())
        # And nothing of the model is: a guard on this would be a recompilation.
        model.embedding_scale = 5.0
        compiled.steps[GREEDY](both, both.clone())
