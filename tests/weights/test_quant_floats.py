"""Checkpoints in floats of 8 and 4 bits mean what the libraries mean that write them; lies and damage
are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base.errors import InputError
from tests.weights.quant_files import DIM, LAYER, check_disagreement, save
from tests.weights.quant_float_files import (
    BY_NAME,
    KINDS,
    FloatKind,
    compressed,
    e4m3,
    fp8_blocks,
    write,
    write_gpt_oss,
)
from weights.checkpoint import Entry
from weights.open import open_checkpoint
from weights.outline import read_outline
from weights.schemes import MXFP4, NVFP4, fp8_scheme

Q, DOWN = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.down_proj"
Stored = dict[str, Tensor]


def whole(entry: Entry) -> Tensor:
    return entry.read(tuple(slice(0, size) for size in entry.shape))


def check_cuts(entry: Entry, wanted: Tensor) -> None:
    """Every legal part of an entry is that part of the whole, bit for bit; the whole is `wanted`."""
    assert entry.quant is not None
    assert entry.scheme is not None
    n, k = entry.shape
    read = whole(entry)
    if entry.scheme == NVFP4:  # two roundings, and one of the factor of the weight
        torch.testing.assert_close(read, wanted.float(), rtol=2**-22, atol=0)
    else:
        assert torch.equal(read, wanted.float())
    borders = range(0, k + 1, entry.scheme.unit)
    pairs = list(combinations(borders, 2))
    for i, columns in enumerate([*pairs[:: max(1, len(pairs) // 12)], (0, k)]):
        for rows in ((0, n), (i % n, min(i % n + 40, n)), (3, 3)):
            part = entry.quant(slice(*rows), slice(*columns))
            assert part.codes == entry.scheme.code_name
            assert torch.equal(part.dequantize(), read[slice(*rows), slice(*columns)])
    assert torch.equal(entry.read((slice(5, 9), slice(33, 50))), read[5:9, 33:50])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_floats_are_read_quantized_and_dequantized(kind: FloatKind, tmp_path: Path) -> None:
    _, weights = write(tmp_path, kind)
    checkpoint, outline = open_checkpoint(tmp_path), read_outline(tmp_path)
    assert outline is not None
    assert checkpoint.entries.keys() == outline.weights.keys()
    assert checkpoint.entries["lm_head.weight"].scheme is None
    for name, entry in checkpoint.entries.items():
        assert entry.scheme == outline.weights[name].scheme
        assert entry.scheme == (kind.scheme if name in weights else None)
    for name in (f"{DOWN}.weight", f"{LAYER}self_attn.v_proj.weight"):
        check_cuts(checkpoint.entries[name], weights[name])


def test_rows_that_are_not_whole_steps_are_dequantized(tmp_path: Path) -> None:
    kind = BY_NAME["deepseek-f32"]
    stored, _ = write(tmp_path, kind)
    parts, wanted = fp8_blocks(130, 200, "weight_scale_inv", "f32")
    save(tmp_path, stored | {f"{Q}.{end}": tensor for end, tensor in parts.items()}, kind.about)
    checkpoint, outline = open_checkpoint(tmp_path), read_outline(tmp_path)
    assert outline is not None
    entry = checkpoint.entries[f"{Q}.weight"]
    assert entry.scheme == outline.weights[f"{Q}.weight"].scheme == fp8_scheme(128)
    assert not entry.scheme.can_cut(0, 200)
    assert torch.equal(whole(entry), wanted.float())
    assert torch.equal(entry.read((slice(100, 130), slice(120, 200))), wanted[100:, 120:].float())


def test_as_transformers_reads_blocks_of_e4m3() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts, wanted = fp8_blocks(256, 384, "weight_scale_inv", "f32")
    found = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"])
    assert torch.equal(found.float(), wanted.float())


@pytest.mark.parametrize("dtype", ["u8", "e8m0"])
def test_experts_of_gpt_oss(dtype: str, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, wanted = write_gpt_oss(tmp_path)
    if dtype == "e8m0":
        powers = {
            name: tensor.view(torch.float8_e8m0fnu)
            for name, tensor in stored.items()
            if name.endswith("_scales")
        }
        save(tmp_path, stored | powers, {"quant_method": "mxfp4"})
    checkpoint, outline = open_checkpoint(tmp_path), read_outline(tmp_path)
    assert outline is not None
    assert checkpoint.entries.keys() == outline.weights.keys()
    assert wanted.keys() | {"model.embed_tokens.weight"} == checkpoint.entries.keys()
    module = f"{LAYER}mlp.experts"
    for name, values in wanted.items():
        entry = checkpoint.entries[name]
        assert entry.scheme == outline.weights[name].scheme
        if name.endswith(".bias"):
            assert torch.equal(whole(entry), values)
            assert torch.equal(entry.read((slice(3, 20),)), values[3:20])
            continue
        assert entry.scheme == MXFP4
        check_cuts(entry, values)
    theirs = convert_moe_packed_tensors(
        stored[f"{module}.gate_up_proj_blocks"], stored[f"{module}.gate_up_proj_scales"],
        dtype=torch.float32,
    )  # fmt: skip
    for expert in range(3):
        gate = whole(checkpoint.entries[f"{module}.{expert}.gate_proj.weight"])
        up = whole(checkpoint.entries[f"{module}.{expert}.up_proj.weight"])
        # `GptOssExperts`: x @ gate_up_proj, of which every second output is a gate.
        assert torch.equal(torch.stack((gate, up), 1).flatten(0, 1), theirs[expert].t())


@pytest.mark.parametrize("kind", [*KINDS, None], ids=lambda kind: kind.name if kind else "gpt-oss")
def test_a_part_needs_no_more_than_it_says(kind: FloatKind | None, tmp_path: Path) -> None:
    """`Entry.stored_in`: all that it does not name is spoiled, and the part is read as before."""
    stored, _ = write_gpt_oss(tmp_path) if kind is None else write(tmp_path, kind)
    names = [f"{DOWN}.weight"]
    if kind is None:
        names = [f"{LAYER}mlp.experts.1.{name}_proj.{end}" for name in ("up", "down") for end in
                 ("weight", "bias")]  # fmt: skip
    for name in names:
        entry = open_checkpoint(tmp_path).entries[name]
        part = (slice(40, 90), slice(32, 96))[: len(entry.shape)]
        wanted = entry.read(part)
        assert entry.stored_in is not None
        needed = entry.stored_in(part)
        assert entry.stored_in(tuple(slice(7, 7) for _ in part)) == [] or name.endswith("bias")
        spoiled = dict(stored)
        for stored_name, slices in needed:
            tensor = stored[stored_name].reshape(-1)
            dtype, shape = tensor.dtype, stored[stored_name].shape
            number = torch.uint8 if tensor.element_size() == 1 else dtype  # float8 cannot be put
            copy = torch.full_like(tensor.view(torch.uint8), 0xFF).view(number).reshape(shape)
            copy[slices] = tensor.view(number).reshape(shape)[slices]
            spoiled[stored_name] = copy.view(dtype)
        about = {"quant_method": "mxfp4"} if kind is None else kind.about
        (tmp_path / "spoiled").mkdir(exist_ok=True)
        save(tmp_path / "spoiled", spoiled, about)
        assert torch.equal(open_checkpoint(tmp_path / "spoiled").entries[name].read(part), wanted)


def test_modelopt_declares_in_a_file_of_its_own(tmp_path: Path) -> None:
    kind = BY_NAME["modelopt-nvfp4"]
    stored, weights = write(tmp_path, kind)
    save(tmp_path, stored, None)
    about = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": about})
    )
    checkpoint, outline = open_checkpoint(tmp_path), read_outline(tmp_path)
    assert outline is not None
    for name in weights:
        assert checkpoint.entries[name].scheme == outline.weights[name].scheme == NVFP4


def test_modules_of_several_formats(tmp_path: Path) -> None:
    """compressed-tensors' and ModelOpt's mixed precision."""
    stored, weights = write(tmp_path, BY_NAME["ct-nvfp4"])
    parts, values = BY_NAME["ct-channel"].make(DIM, DIM)
    for name in [name for name in stored if name.startswith(f"{Q}.")]:
        del stored[name]
    stored |= {f"{Q}.{end}": tensor for end, tensor in parts.items()}
    weights[f"{Q}.weight"] = values
    groups: dict[str, Any] = {}
    for i, name in enumerate(("ct-nvfp4", "ct-channel")):
        about = BY_NAME[name].about
        groups[f"group_{i}"] = about["config_groups"]["group_0"] | {"format": about["format"]}
    save(tmp_path, stored, compressed("mixed-precision") | {"config_groups": groups})
    layers = {Q: {"quant_algo": "FP8"}, DOWN: {"quant_algo": "NVFP4", "group_size": 16}}
    modelopt: dict[str, Any] = {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers,
    }  # fmt: skip
    for is_modelopt in (False, True):
        if is_modelopt:
            stored = {
                name.replace("weight_packed", "weight"): tensor
                for name, tensor in stored.items()
                if not name.endswith("weight_global_scale")
            }
            stored |= {
                name.replace("weight_scale", "weight_scale_2"): torch.ones(())
                for name, tensor in stored.items()
                if name.endswith("weight_scale") and tensor.dtype == torch.float8_e4m3fn
            }
            save(tmp_path, stored, modelopt)
        checkpoint, outline = open_checkpoint(tmp_path), read_outline(tmp_path)
        assert outline is not None
        for name in weights:
            scheme = fp8_scheme(0) if name.startswith(Q) else NVFP4
            assert checkpoint.entries[name].scheme == outline.weights[name].scheme == scheme
        assert torch.equal(whole(checkpoint.entries[f"{Q}.weight"]), values.float())


def drop(name: str) -> Callable[[Stored, dict[str, Any]], None]:
    return lambda stored, about: stored.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[Stored, dict[str, Any]], None]:
    return lambda stored, about: stored.update({name: tensor})


def say(**values: Any) -> Callable[[Stored, dict[str, Any]], None]:
    return lambda stored, about: about.update(values)


def weights_say(**values: Any) -> Callable[[Stored, dict[str, Any]], None]:
    return lambda stored, about: about["config_groups"]["group_0"]["weights"].update(values)


BLOCKS, TENSOR = "deepseek-f32", "fp8-tensor"
LIES: list[tuple[str, Callable[[Stored, dict[str, Any]], None], str]] = [
    (BLOCKS, drop(f"{Q}.weight_scale_inv"), "q_proj.weight is stored as F8_E4M3 without scales"),
    (BLOCKS, drop(f"{Q}.weight"), "q_proj.weight is missing"),
    (BLOCKS, put(f"{Q}.weight", torch.ones(DIM, DIM)), "weight is stored as F32"),
    (BLOCKS, put(f"{Q}.weight", e4m3(DIM)), "must be a matrix"),
    (BLOCKS, put(f"{Q}.weight_scale_inv", torch.ones(3, 2)), r"scale_inv has shape \[3, 2\] for a"),
    (BLOCKS, put(f"{Q}.weight_scale_inv", torch.ones(2, 3)), r"scale_inv has shape \[2, 3\]"),
    (BLOCKS, put(f"{Q}.weight_scale_inv", torch.ones(2, 2, 1)), r"scale_inv has shape \[2, 2, 1\]"),
    (BLOCKS, put(f"{Q}.weight_scale_inv", torch.ones(2, 2).int()), "is stored as I32"),
    (BLOCKS, say(weight_block_size=[64, 64]), r"scale_inv has shape \[\d, \d\]"),
    (BLOCKS, say(weight_block_size=[128, 100]), "group_size 100; supported are multiples of 32"),
    (BLOCKS, say(weight_block_size=128), "blocks of 128; they must be a number of rows and one of"),
    (BLOCKS, say(weight_block_size=[True, 128]), r"blocks of \[True, 128\]"),
    (BLOCKS, say(fmt="e5m2"), "'e5m2', which is not supported"),
    (BLOCKS, say(modules_to_not_convert=[Q]), "although the config excludes it"),
    (BLOCKS, say(ignored_layers=[Q]), "although the config excludes it"),
    (TENSOR, put(f"{Q}.weight_scale", torch.ones(2)), r"weight_scale has shape \[2\] for a weight of"),
    (TENSOR, put(f"{Q}.weight_scale", torch.ones(DIM, 2)), r"weight_scale has shape \[192, 2\]"),
    ("ct-block", weights_say(block_structure=None), "blocks of None"),
    ("ct-block", weights_say(symmetric=False), "not symmetric"),
    ("ct-block", weights_say(num_bits=4), "4 bits; supported are 8"),
    ("ct-block", weights_say(strategy="tensor_group"), "strategy 'tensor_group'"),
    ("ct-block", say(format="int-quantized"), "type 'float'; int-quantized supports int"),
    ("ct-nvfp4", weights_say(group_size=32), "group_size 32; nvfp4-pack-quantized has 16"),
    ("ct-nvfp4", drop(f"{Q}.weight_global_scale"), "q_proj.weight_global_scale is missing"),
    ("ct-nvfp4", put(f"{Q}.weight_global_scale", torch.ones(3)), r"shape \[3\]; it must be a number"),
    ("ct-nvfp4", put(f"{Q}.weight_scale", e4m3(DIM, 5)), r"weight_scale has shape \[192, 5\]"),
    ("ct-nvfp4", put(f"{Q}.weight_scale", e4m3(3)), r"weight_scale has shape \[3\]"),
    ("ct-nvfp4", put(f"{Q}.weight", torch.ones(DIM, DIM)), "is stored twice"),
    ("ct-mxfp4", put(f"{Q}.weight_scale", e4m3(DIM, DIM // 32)), "weight_scale is stored as F8_E4M3"),
    ("modelopt-fp8", say(quant_algo="NVFP4_AWQ"), "quant_algo 'NVFP4_AWQ', which is not supported"),
    ("modelopt-fp8", say(quant_algo=["FP8"]), "which is not supported"),
    ("modelopt-fp8", say(quant_algo="MIXED_PRECISION"), "'quantized_layers' that is not empty"),
    ("modelopt-fp8", say(quantization=[]), "quantization that is not an object"),
    ("modelopt-fp8", put(f"{Q}.pre_quant_scale", torch.ones(DIM)), "pre_quant_scale scales activ"),
    ("modelopt-nvfp4", say(group_size=32), "group_size 32; NVFP4 has 16"),
    ("modelopt-nvfp4", drop(f"{Q}.weight_scale_2"), "weight_scale_2 is missing"),
    ("modelopt-nvfp4", put(f"{Q}.weight", e4m3(DIM, DIM)), "weight_scale is stored as F8_E4M3"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lie", "match"), LIES)
def test_config_and_tensors_must_agree(
    name: str, lie: Callable[[Stored, dict[str, Any]], None], match: str, tmp_path: Path
) -> None:
    stored, _ = write(tmp_path, BY_NAME[name])
    about = json.loads(json.dumps(BY_NAME[name].about))
    check_disagreement(tmp_path, stored, about, lie, match)


def spoiled(tensor: Tensor, value: int | float) -> Tensor:
    """`tensor` with its last number changed: `value`, or the bits of that number."""
    copy = tensor.clone()
    flat = copy.view(torch.uint8 if isinstance(value, int) else copy.dtype).view(-1)
    flat[-1] = value
    return copy


DAMAGE = [
    (BLOCKS, "weight", 0x7F, "q_proj.weight has numbers that are NaN"),
    (BLOCKS, "weight", 0xFF, "q_proj.weight has numbers that are NaN"),
    (BLOCKS, "weight_scale_inv", float("nan"), "weight_scale_inv has scales that are not finite"),
    ("deepseek-bf16", "weight_scale_inv", float("inf"), "weight_scale_inv has scales that are not fin"),
    ("ue8m0", "weight_scale_inv", 255, "weight_scale_inv has scales that are not finite"),
    ("ue8m0-u8", "weight_scale_inv", 255, "weight_scale_inv has scales that are not finite"),
    (TENSOR, "weight_scale", float("inf"), "weight_scale has scales that are not finite"),
    ("ct-nvfp4", "weight_scale", 0x7F, "weight_scale has numbers that are NaN"),
    ("ct-nvfp4", "weight_global_scale", 0.0, "weight_global_scale is 0.0; it must be positive"),
    ("ct-nvfp4", "weight_global_scale", 1e-40, "it must be positive"),
    ("modelopt-nvfp4", "weight_scale_2", -1.0, "weight_scale_2 is -1.0; it must be positive"),
    ("modelopt-nvfp4", "weight_scale_2", float("nan"), "weight_scale_2 has scales that are not finite"),
    ("ct-mxfp4", "weight_scale", 255, "weight_scale has scales that are NaN"),
    ("ct-mxfp8", "weight_scale", 255, "weight_scale has scales that are NaN"),
]


@pytest.mark.parametrize(("name", "end", "value", "match"), DAMAGE)
def test_numbers_that_cannot_be_are_refused_as_they_are_read(
    name: str, end: str, value: int | float, match: str, tmp_path: Path
) -> None:
    stored, _ = write(tmp_path, BY_NAME[name])
    save(tmp_path, stored | {f"{Q}.{end}": spoiled(stored[f"{Q}.{end}"], value)}, BY_NAME[name].about)
    entry = open_checkpoint(tmp_path).entries[f"{Q}.weight"]
    with pytest.raises(InputError, match=match):
        whole(entry)
    if end == "weight":  # only what is read is checked
        assert torch.isfinite(entry.read((slice(0, DIM - 1), slice(0, DIM)))).all()


STACK = f"{LAYER}mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("end", "tensor", "match"),
    [
        (
            "blocks",
            torch.zeros(3, 192, 3, 8, dtype=torch.uint8),
            r"shape \[3, 192, 3, 8\], and must be",
        ),
        ("blocks", torch.zeros(3, 191, 3, 16, dtype=torch.uint8), "191 rows, an odd number"),
        ("blocks", torch.zeros(3, 192, 3, 16), "is stored as F32"),
        ("scales", torch.zeros(3, 192, 4, dtype=torch.uint8), r"must be .* of shape \[3, 192, 3\]"),
        ("bias", torch.zeros(3, 96), r"must be .* of shape \[3, 192\]"),
        (
            "scales",
            torch.full((3, 192, 3), 255, dtype=torch.uint8),
            "gate_up_proj_scales has scales th",
        ),
    ],
)
def test_damaged_experts_are_refused(end: str, tensor: Tensor, match: str, tmp_path: Path) -> None:
    stored, _ = write_gpt_oss(tmp_path)
    save(tmp_path, stored | {f"{STACK}_{end}": tensor}, {"quant_method": "mxfp4"})
    with pytest.raises(InputError, match=match):
        whole(open_checkpoint(tmp_path).entries[f"{LAYER}mlp.experts.2.up_proj.weight"])


def test_quantized_weights_need_their_config(tmp_path: Path) -> None:
    for name in (BLOCKS, TENSOR):
        save(tmp_path, write(tmp_path, BY_NAME[name])[0], None)
        with pytest.raises(InputError, match="has no quantization_config, but the weights are"):
            open_checkpoint(tmp_path)
    save(tmp_path, write_gpt_oss(tmp_path)[0], None)
    with pytest.raises(InputError, match="has no quantization_config, but the weights are"):
        open_checkpoint(tmp_path)
