"""Models whose files hold floats of 8 or 4 bits, or integers with quantized activations, end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comm.group import Group
from models.load import config_of, linears_of, load_model
from models.quant_rules import Quant, is_linear, parse_quant
from tests.running import RunRanks
from tests.targets.quant import TOKENS, logits_of, wanted_file
from tests.weights import quant_files, quant_float_files
from tests.weights.quant_float_files import BY_NAME, FloatKind
from weights.open import open_checkpoint

ALONE = Group(0, 1)
NAMES = ("deepseek-f32", "ue8m0", "ct-channel", "ct-mxfp8", "modelopt-nvfp4", "ct-mxfp4")


def write_twin(folder: Path, kind: FloatKind) -> tuple[Path, Path]:
    """The model of `kind`, and one of its weights in float32 (dequantized without Yoke's code)."""
    for name in ("kept", "plain"):
        (folder / name).mkdir()
    stored, weights = quant_float_files.write(folder / "kept", kind)
    modules = tuple(name.removesuffix("weight") for name in weights)
    plain = {name: tensor for name, tensor in stored.items() if not name.startswith(modules)}
    quant_files.save(
        folder / "plain", plain | {name: tensor.float() for name, tensor in weights.items()}, None
    )
    return folder / "kept", folder / "plain"


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_model_computes_with_the_numbers_of_its_file(name: str, tmp_path: Path) -> None:
    kept, plain = write_twin(tmp_path, BY_NAME[name])
    checkpoint = open_checkpoint(plain)
    model = load_model(config_of(checkpoint), checkpoint, ALONE, torch.float32)
    model.setup(1, 32)
    tokens = torch.tensor(TOKENS)
    wanted = model.all_logits(tokens, torch.arange(tokens.shape[1]))
    found = logits_of(kept, "auto", ALONE)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    checkpoint = open_checkpoint(kept)
    model = load_model(
        config_of(checkpoint), checkpoint, ALONE, torch.bfloat16, quant=parse_quant("auto")
    )
    assert model.about_quant == ""  # all layers are kept


def test_ranks_compute_what_one_computes(tmp_path: Path, run_ranks: RunRanks) -> None:
    """Also where a rank's columns begin inside a block of 128."""
    models = []
    for name in ("deepseek-f32", "modelopt-nvfp4"):
        (tmp_path / name).mkdir()
        quant_float_files.write(tmp_path / name, BY_NAME[name])
        file = tmp_path / name / "model.safetensors"
        torch.save(logits_of(file, "auto", ALONE), wanted_file(file, "auto"))
        models.append((str(file), "auto"))
    code, _, err = run_ranks("quant", 3, sizes=[2, 3], models=models)
    assert code == 0, err


@torch.no_grad()
def test_int8_with_quantized_activations(tmp_path: Path) -> None:
    """W8A8 of compressed-tensors: the weights are kept, and `activations=int8` rounds prompts."""
    kind = quant_files.Kind("int-quantized", 8, 0, True)
    stored, _ = quant_files.write(tmp_path, kind)
    about = quant_files.declared(kind)
    about["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    quant_files.save(tmp_path, stored, about)
    checkpoint = open_checkpoint(tmp_path)
    tokens = torch.arange(2, 50)[None]  # matrix units take 33 rows and more
    found = {}
    for rounds in (False, True):
        quant = Quant(None, round_prompts=rounds)
        model = load_model(config_of(checkpoint), checkpoint, ALONE, torch.bfloat16, quant=quant)
        assert model.about_quant == ""
        held = [layer.packing for layer, names in linears_of(model) if is_linear(names[0])]
        assert len(held) == 4
        for packing in held:
            assert packing is not None
            assert packing.round_x == rounds
            assert {part.code_name for part in packing.parts} == {"i8"}
        model.setup(1, 64)
        found[rounds] = model.all_logits(tokens, torch.arange(tokens.shape[1])).float()
    error = float((found[True] - found[False]).abs().mean() / found[False].abs().mean())
    assert error < 0.05  # 255 steps of each row; 0 where the processor lacks such units
