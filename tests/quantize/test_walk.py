"""A model taken layer by layer against the same model whole, and what GPTQ is shown on the way."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comm.group import Group
from models.config import ModelConfig, Rope, expected_shapes
from models.load import config_of, load_model
from models.perplexity import perplexity
from models.quant_rules import parse_asked
from quantize import calibrate
from quantize.calibrate import Settings
from quantize.gptq import gptq
from quantize.grid import Grid, search_grid
from quantize.plan import plan_quantize
from quantize.read_back import read_back
from quantize.run import carry_out
from quantize.texts import spread
from quantize.walk import Walk, perplexity_of
from tests.quantize.small import CONFIG, TEXT, make_folder
from weights.checkpoint import Checkpoint
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint

BASE = replace(CONFIG, num_layers=3, num_kv_heads=4, rope=Rope(100.0))
CONFIGS = {
    "llama": replace(BASE, window=5, windowed=(1,), no_rope=(2,), residual_scale=0.7, qk_norm=True),
    "tied": replace(BASE, tie_embeddings=True, mlp_bias=True, logits_scale=0.5, logits_cap=3.0),
    "gemma": replace(
        BASE, block="gemma", norm="rms1p", activation="gelu_tanh", window=4, windowed=(0, 1),
        local_rope=Rope(10.0), embedding_scale=96**0.5, attention_cap=4.0, tie_embeddings=True,
        attention_bias=False, attention_out_bias=False,
    ),
    "parallel": replace(
        BASE, block="parallel", norm="layer", activation="gelu", gated=False, mlp_bias=True,
        head_bias=True, two_norms=True,
    ),
}  # fmt: skip


def random_model(config: ModelConfig) -> Checkpoint:
    return random_checkpoint(expected_shapes(config), seed=5)


def texts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, CONFIG.vocab_size, (length,), generator=generator) for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_at_a_time_is_the_whole_model(name: str) -> None:
    config = CONFIGS[name]
    checkpoint = random_model(config)
    model = load_model(config, checkpoint, Group(0, 1), torch.float32)
    model.setup(1, 20)
    walk = Walk(checkpoint, config, texts(20, 9))
    for index in range(config.num_layers):
        walk.leave(walk.layer(index))
    for state, text in zip(walk.states, texts(20, 9), strict=True):
        positions = torch.arange(len(text))
        wanted = model.hidden(text, positions, torch.zeros_like(positions))
        torch.testing.assert_close(model.norm(state), wanted)
    assert all(parameter.is_meta for layer in walk.model.layers for parameter in layer.parameters())
    whole = texts(20)
    assert perplexity_of(checkpoint, config, whole) == pytest.approx(
        perplexity(model, whole[0][None]), rel=1e-5
    )


def test_the_tokens_of_several_texts_count_alike() -> None:
    config = CONFIGS["llama"]
    checkpoint = random_model(config)
    both, (long, short) = texts(20, 9), texts(20, 9)
    one, other = (math.log(perplexity_of(checkpoint, config, [text])) for text in (long, short))
    wanted = math.exp((19 * one + 8 * other) / 27)
    assert perplexity_of(checkpoint, config, both) == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_inputs_are_those_of_the_quantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs from which each linear's Hessian was computed, against the inputs of the
    same linear in the quantized model, run as a whole."""
    checkpoint = open_checkpoint(make_folder(tmp_path / "model"))
    plan = plan_quantize(checkpoint, parse_asked("int4-g32"))
    seen: list[Tensor] = []

    def watched(weight: Tensor, hessian: Tensor, grid: Grid, damp: float, sort: bool) -> Tensor:
        seen.append(hessian.clone())
        return gptq(weight, hessian, grid, damp, sort)

    monkeypatch.setattr(calibrate, "gptq", watched)
    text = spread(torch.tensor([ord(c) for c in TEXT]), 100, 50)
    out = tmp_path / "out"
    out.mkdir()
    carry_out(plan, out, False, (Settings(plan.scheme, False, 0.01, True), text))
    # The last linear of the second layer comes after all others.
    written = read_back(plan, out)
    model = load_model(config_of(checkpoint), written, Group(0, 1), torch.float32)
    model.setup(1, 50)
    for number, linear in ((0, "0.attention.qkv"), (5, "1.attention.out"), (7, "1.mlp.down")):
        inputs: list[Tensor] = []
        part = model.layers.get_submodule(linear)
        hook = part.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
        for piece in text:
            positions = torch.arange(len(piece))
            model.hidden(piece, positions, torch.zeros_like(positions))
        hook.remove()
        x = torch.cat(inputs)
        torch.testing.assert_close(seen[number], x.t() @ x / len(x), rtol=1e-3, atol=1e-3)
    assert len(seen) == 8


def test_gptq_keeps_outputs_nearer_than_rounding(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_folder(tmp_path / "model"))
    plan = plan_quantize(checkpoint, parse_asked("int4-g32"))
    text = spread(torch.tensor([ord(c) for c in TEXT]), 100, 50)
    settings = Settings(plan.scheme, True, 0.01, True)
    walk = Walk(checkpoint, plan.config, text)
    block = walk.layer(0)
    rounded = []
    for path in calibrate.LINEARS:
        if path == "mlp.up":
            continue
        linear = block.get_submodule(path)
        weight = linear.get_parameter("weight")
        hessian = calibrate.hessian_of(walk.inputs(block, linear), weight.shape[1])
        assert hessian is not None
        grid = search_grid(weight, plan.scheme)
        change = grid.values(grid.integers(weight)) - weight
        rounded.append(float((change @ hessian * change).sum()))
    errors = [one for one, _ in calibrate.quantize_block(walk, block, 0, settings)]
    assert [one.name.split(".")[-2] for one in errors] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    by_product = [errors[:3], errors[3:4], errors[4:6], errors[6:]]
    for ours, plain in zip(by_product, rounded, strict=True):
        assert sum(one.output_error or 0.0 for one in ours) < 0.8 * plain


def test_pieces_are_spread_over_a_text() -> None:
    text = torch.arange(1001)
    assert [len(piece) for piece in spread(text, 100, 100)] == [100] * 10  # one token predicts nothing
    pieces = spread(text, 4, 100)
    assert [int(piece[0]) for piece in pieces] == [0, 200, 500, 700]
    assert [len(piece) for piece in spread(text[:30], 4, 100)] == [30]
