"""Compiled steps on disk: what describes a model, what a package's key depends on, and damage."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comm.group import Group
from engine.compile_child import export_step
from engine.packages import MANIFEST, StepShape, checksum_of, describe, is_complete, key_of
from engine.steps import BEAMS, DECODE, EXTEND, GREEDY
from kernels.load import load_kernels
from models.config import ModelConfig, expected_shapes
from models.decoder import Decoder
from models.load import config_of, load_model
from models.presets import PRESETS
from models.quant_rules import parse_quant
from tests.models.families import NAMES, save
from weights.formats.random_io import random_checkpoint
from weights.open import open_checkpoint

ALONE = Group(0, 1)
TINY = replace(PRESETS["tiny"], num_layers=1)
SHAPE = StepShape(num_rows=2, cache_len=64, chunk=32)


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32, quant: str = "none") -> Decoder:
    weights = random_checkpoint(expected_shapes(config), 1)
    model = load_model(config, weights, ALONE, dtype, quant=parse_quant(quant))
    model.setup(SHAPE.num_rows, SHAPE.cache_len)
    return model


def tensors_of(model: Decoder) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_description_has_the_models_shapes_and_none_of_its_values(tied: bool) -> None:
    model = model_of(replace(TINY, tie_embeddings=tied), torch.bfloat16, "int8/int8")
    copy: Decoder = pickle.loads(describe(model))
    before, after = tensors_of(model), tensors_of(copy)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = after[name]
        assert (same.shape, same.stride(), same.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        assert not same.any()
    assert (copy.head.weight is copy.embed.weight) == (model.head.weight is model.embed.weight)
    assert copy.config == model.config


def test_a_description_of_much_memory_takes_none() -> None:
    # More than this machine has: 2 layers of a large model, whose rooms are never written to.
    config = replace(PRESETS["llama-70b"], num_layers=2)
    with torch.device("meta"):
        model = Decoder(config, ALONE)
    before = torch.empty(1)  # a real tensor, for its kind
    copy = pickle.loads(describe(model))
    weight = next(copy.parameters())
    assert weight.device == before.device
    assert weight.numel() == next(model.parameters()).numel()


def test_a_key_depends_on_structure_and_not_on_values_or_paths() -> None:
    def key(model: Decoder, step: str = GREEDY, shape: StepShape = SHAPE) -> str:
        return key_of(describe(model), step, shape)

    model, others = model_of(TINY), []
    with torch.no_grad():
        changed = model_of(TINY)
        changed.embed.weight.add_(1.0)
    assert key(model) == key(changed)
    others.append(key(model, EXTEND))
    others.append(key(model, shape=replace(SHAPE, chunk=16)))
    others.append(key(model_of(replace(TINY, num_layers=2))))
    others.append(key(model_of(replace(TINY, norm_eps=1e-4))))
    others.append(key(model_of(TINY, torch.bfloat16)))
    others.append(key(model_of(TINY, torch.bfloat16, "int8/int8")))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    others.append(key(model))
    torch.set_num_threads(threads)
    assert len({key(model), *others}) == len(others) + 1


KEY = """
import torch
from engine.packages import describe, key_of
from tests.engine.test_packages import SHAPE, TINY, model_of
torch.set_num_threads(1)
print(key_of(describe(model_of(TINY, torch.bfloat16, "int4-g32/int8")), "extend", SHAPE))
"""


def test_a_key_is_the_same_in_every_process() -> None:
    keys = {
        subprocess.run([sys.executable, "-c", KEY], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(keys) == 1


def test_a_damaged_package_is_not_complete(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir(mode=0o700)
    file = package / "step.so"
    file.write_bytes(b"code")
    file.chmod(0o600)
    assert not is_complete(package)  # nothing says what it should be
    (package / MANIFEST).write_text(json.dumps({"files": {"step.so": checksum_of(file)}}))
    assert is_complete(package)
    for damage in (b"cod", b"core"):
        file.write_bytes(damage)
        assert not is_complete(package)
    file.unlink()
    assert not is_complete(package)
    (package / MANIFEST).write_text("{")
    assert not is_complete(package)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_steps_of_every_family_are_one_graph_for_any_number_of_tokens(
    name: str, tmp_path: Path
) -> None:
    load_kernels()
    save(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = load_model(config_of(checkpoint), checkpoint, ALONE, torch.float32)
    model.setup(SHAPE.num_rows, SHAPE.cache_len)
    bare = pickle.loads(describe(model))
    program = export_step(bare, EXTEND, SHAPE)
    assert len(program.range_constraints) == 2
    for bounds in program.range_constraints.values():
        assert (bounds.lower, bounds.upper) == (2, SHAPE.chunk)
    where = torch.tensor([[3, 5, 7], [0, 1, 0], [0, 0, 1]])
    wanted = torch.tensor([1, 2])
    with torch.no_grad():
        expected = model.extend(where[0], where[1], where[2], wanted)
        # The graph, with the values that the model has.
        graph = export_step(model, EXTEND, SHAPE).module()
        torch.testing.assert_close(graph(where, wanted), expected, rtol=1e-4, atol=1e-5)
    assert not export_step(bare, GREEDY, SHAPE).range_constraints


def test_steps_that_sample_and_search_can_be_exported() -> None:
    load_kernels()
    model = model_of(TINY)
    for name in (DECODE, BEAMS):
        assert export_step(model, name, SHAPE).graph.nodes
