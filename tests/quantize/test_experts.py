"""A mixture of experts quantized by the command, and loaded again; experts that nothing is known of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch import Tensor

from comm.group import Group
from models.config import ModelConfig, expected_shapes
from models.load import config_of, load_model
from models.mlp import ACTIVATIONS, Experts
from models.quant_rules import parse_quant
from quantize.calibrate import Settings, hessian_of, quantize_block, quantize_matrix
from quantize.command import main
from quantize.walk import Walk
from tests.models.expert_files import KEYS, MIXTRAL, in_mixtral
from tests.quantize.small import TEXT
from weights.checkpoint import Checkpoint
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint
from weights.quant import parse_scheme

SOURCE = replace(MIXTRAL, vocab_size=128, max_seq_len=512)
UNROUTED = 3  # an expert that the router never chooses


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Mixtral's, with a token for each character of ASCII."""
    folder = tmp_path_factory.mktemp("source") / "model"
    folder.mkdir()
    more = {"vocab_size": 128, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(KEYS | more))
    save_file(
        {in_mixtral(name): tensor for name, tensor in tensors().items()}, folder / "model.safetensors"
    )
    vocab = {chr(i): i for i in range(128)}
    Tokenizer(tokenizer_models.BPE(vocab, [])).save(str(folder / "tokenizer.json"))
    return folder


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, shape in expected_shapes(SOURCE).items():
        values = torch.randn(shape, generator=generator)
        norm = name.endswith("norm.weight")
        found[name] = torch.ones(shape) if norm else (values * shape[-1] ** -0.5).bfloat16()
    # Inputs of the router have a first component that is always large.
    found["model.embed_tokens.weight"][:, 0] = 4.0
    found["model.layers.0.mlp.gate.weight"][UNROUTED, 0] = -30.0
    return found


@torch.no_grad()
def logits(path: Path, quant: str) -> Tensor:
    checkpoint = open_checkpoint(path)
    model = load_model(
        config_of(checkpoint), checkpoint, Group(0, 1), torch.float32, quant=parse_quant(quant)
    )
    model.setup(1, 64)
    tokens = torch.tensor([[ord(char) for char in TEXT[:50]]])
    return model.all_logits(tokens, torch.arange(50))


def test_rounded(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([f"model={source}", f"out={out}", "quant=int4-g32", "output=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "rtn" and report["rounded_experts"] == []
    assert len(report["weights"]) == 4 + 4 * 3 + 1
    about = json.loads((out / "config.json").read_text())["quantization_config"]
    assert about["ignore"] == ["model.layers.0.mlp.gate"]
    # What it holds is what rounding as it is loaded gives, but for that of scales to half precision.
    kept, found = logits(out, "auto"), logits(source, "int4-g32")
    torch.testing.assert_close(kept, found, rtol=1e-2, atol=1e-2 * float(found.abs().max()))
    assert not torch.allclose(kept, logits(source, "none"), rtol=1e-2, atol=1e-2)
    stored = {k for file in out.glob("*.safetensors") for k in load_file(file)}
    assert "model.layers.0.mlp.gate.weight" in stored
    assert "model.layers.0.mlp.experts.1.down_proj.weight_packed" in stored


def test_gptq_and_an_expert_that_no_token_meets(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    words = [f"model={source}", f"calibration={text}", "quant=int4-g32", "sample_len=64"]
    assert main([*words, f"out={tmp_path / 'a'}", "output=json", f"perplexity={text}"]) == 0
    report = json.loads(capsys.readouterr().out)
    unrouted = [
        f"model.layers.0.mlp.experts.{UNROUTED}.{p}_proj.weight" for p in ("gate", "up", "down")
    ]
    assert report["rounded_experts"] == unrouted
    by_name = {one["name"]: one for one in report["weights"]}
    assert all(by_name[name]["output_error"] is None for name in unrouted)
    assert all(0 < by_name[name]["weight_error"] < 0.05 for name in unrouted)
    assert 0 < report["output_error"] < report["weight_error"] < 0.05
    assert report["perplexity_after"] == pytest.approx(report["perplexity_before"], rel=0.2)
    assert logits(tmp_path / "a", "auto").isfinite().all()
    assert main([*words, f"out={tmp_path / 'b'}"]) == 0
    assert "3 weights of experts that no token" in capsys.readouterr().out.replace("\n", " ")


def test_an_expert_is_shown_what_the_router_gives_it() -> None:
    """Against the inputs picked token by token, and the model's own output with what was quantized."""
    config = replace(SOURCE, vocab_size=64)
    checkpoint = random_checkpoint(expected_shapes(config), 5)
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(0, 64, (length,), generator=generator) for length in (30, 9)]
    settings = Settings(parse_scheme("int4-g32"), False, 0.01, True)
    found = quantized_by_hand(checkpoint, config, texts, settings)
    walk = Walk(checkpoint, config, texts)
    errors = {e.name: e for e, _ in quantize_block(walk, walk.layer(0), 0, settings)}
    for name, (error, square) in found.items():
        assert errors[name].error == pytest.approx(error, rel=1e-4)
        assert errors[name].output_square == pytest.approx(square, rel=1e-4)


@torch.no_grad()
def quantized_by_hand(
    checkpoint: Checkpoint, config: ModelConfig, texts: list[Tensor], settings: Settings
) -> dict[str, tuple[float, float]]:
    """The squared error of expert 0's weights and the energy of its outputs, by the tokens one by one,
    with the attention of the layer quantized."""
    walk = Walk(checkpoint, config, texts)
    block = walk.layer(0)
    for errors, _ in quantize_block(walk, block, 0, settings):
        if ".experts." in errors.name:
            break  # attention is quantized
    experts = next(module for module in block.modules() if isinstance(module, Experts))
    original: Any = load_model(config, checkpoint, Group(0, 1), torch.float32).layers[0].mlp
    own = []
    for x in walk.inputs(block, experts):
        probabilities = torch.softmax(F.linear(x, experts.router.weight), -1)
        for row, shares in zip(x, probabilities, strict=True):
            if 0 in shares.argsort(descending=True)[:2].tolist():
                own.append(row)
    inputs = torch.stack(own)
    gate_up = original.gate_ups.weight[0]
    _, values = quantize_matrix(gate_up, hessian_of(iter([inputs]), inputs.shape[1]), settings)
    gate, up = F.linear(inputs, values).chunk(2, dim=-1)
    hidden = ACTIVATIONS[config.activation](gate) * up
    down = original.downs.weight[0]
    _, rounded = quantize_matrix(down, hessian_of(iter([hidden]), hidden.shape[1]), settings)
    prefix, half = "model.layers.0.mlp.experts.0", len(gate_up) // 2

    def energy(weight: Tensor, x: Tensor) -> float:
        return float(F.linear(x, weight).square().sum() / len(x))

    return {
        f"{prefix}.gate_proj.weight": (
            float((values - gate_up)[:half].square().sum()), energy(gate_up[:half], inputs)
        ),
        f"{prefix}.down_proj.weight": (float((rounded - down).square().sum()), energy(down, hidden)),
    }  # fmt: skip
