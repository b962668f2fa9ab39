"""Compiled steps: each runner's belong to its own model, although no guard checks models; those that
call operators from C++ compute what the eager ones do, and fail with the same words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comm.group import Group
from engine import steps
from engine.steps import DECODE, GREEDY, Runner, make_runner
from kernels.attention import new_cache, write_kv
from kernels.load import load_kernels
from models.config import ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import load_model
from models.presets import PRESETS
from models.quant_rules import parse_quant
from weights.formats.random_io import random_checkpoint

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
    # The arguments of their steps are alike; their graphs differ in depth and in numbers.
    large = PRESETS["tiny"]
    pairs = [pair(large), pair(replace(large, num_layers=1, embedding_scale=3.0))]
    found = [[texts(runner) for runner in runners] for _, *runners in pairs]
    for of_compiled, of_plain in found:
        assert of_compiled == of_plain
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


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "quant"), [(4, "none"), (0, "int4-g32")])
@torch.no_grad()
def test_steps_that_call_from_cpp_are_the_eager_ones(experts: int, quant: str) -> None:
    chosen = 2 if experts else 0
    config = replace(
        PRESETS["tiny"],
        num_layers=1,
        num_experts=experts,
        experts_per_token=chosen,
        expert_dim=32 * chosen,
    )
    weights = random_checkpoint(expected_shapes(config), 1)
    found = []
    for compiled in (True, False):
        model = load_model(config, weights, ALONE, torch.float32, quant=parse_quant(quant))
        runner = make_runner(model, ALONE, 32, compiled, num_rows=2)
        logits = []
        for position in range(3):
            positions = torch.tensor([position, position + 4])
            logits.append(runner.steps[DECODE](torch.tensor([3, 5]), positions).clone())
        found.append(torch.stack(logits))
        with pytest.raises(RuntimeError, match=r"^attend: position 32 in a cache of 32"):
            runner.steps[DECODE](torch.tensor([3, 5]), torch.tensor([0, 32]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not steps._CAN_CALL_IN_CPP, reason="this torch does not call lists from C++")
def test_what_fails_below_compiled_cpp_says_why() -> None:
    """Operators that torch calls through its C interface, which keeps what they threw to itself."""
    assert load_kernels()
    cache = new_cache(2, 1, 8, 4, torch.float32, "cpu")

    def step(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        write_kv(cache, x, x, None, positions)
        return x + 1

    x = torch.zeros(2, 1, 4)
    compiled = torch.compile(step, fullgraph=True, options=dict(steps._CALLED_IN_CPP))
    assert torch.equal(compiled(x, torch.tensor([0, 7])), x + 1)
    with pytest.raises(RuntimeError, match="API call failed"):
        compiled(x, torch.tensor([0, 8]))
    with pytest.raises(RuntimeError, match=r"^attend: position 8 in a cache of 8"):
        steps.with_reason(compiled)(x, torch.tensor([0, 8]))
