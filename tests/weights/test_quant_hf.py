"""Quantized Hugging Face checkpoints mean what the libraries mean that write them; lies are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from base.errors import InputError
from tests.weights.quant_files import (
    DIM,
    FFN,
    LAYER,
    Kind,
    check_disagreement,
    declared,
    module,
    save,
    write,
)  # fmt: skip
from weights.checkpoint import Entry
from weights.open import open_checkpoint
from weights.outline import read_outline
from weights.schemes import Scheme

KINDS = [
    Kind("gptq", 4, 64, True),
    Kind("gptq", 4, 32, False, (("checkpoint_format", "gptq_v2"),)),
    Kind("gptq", 8, 0, False),
    Kind("awq", 4, 64, False),
    Kind("pack-quantized", 4, 64, True),
    Kind("pack-quantized", 4, 96, False),
    Kind("pack-quantized", 8, 32, True, (("scales", torch.float32),)),
    Kind("int-quantized", 8, 0, True),
    Kind("int-quantized", 8, 0, False),
]


def whole(entry: Entry) -> Tensor:
    return entry.read((slice(0, entry.shape[0]), slice(0, entry.shape[1])))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.method}-{k.bits}-{k.group}-{k.symmetric}")
def test_what_is_stored_is_read_quantized_and_dequantized(kind: Kind, tmp_path: Path) -> None:
    _, weights = write(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.entries["lm_head.weight"].scheme is None
    for name, wanted in weights.items():
        entry = checkpoint.entries[name]
        n, k = entry.shape
        assert entry.scheme == Scheme(kind.bits, kind.group, kind.symmetric)
        assert entry.quant is not None
        read = whole(entry)
        if kind.symmetric:
            assert torch.equal(read, wanted)
        else:  # the offset is rounded to the scale's dtype
            torch.testing.assert_close(read, wanted, rtol=0, atol=2**-11 * 255 * 0.006)
            assert (read - wanted).abs().mean() < 1e-4 * (16 if kind.bits == 8 else 1)
        everything = entry.quant(slice(0, n), slice(0, k))
        assert torch.equal(everything.dequantize(), read)
        for rows, columns in (
            ((0, n), (0, 96)),
            ((5, 23), (96, k)),
            ((n - 1, n), (64, 128)),
            ((7, 7), (0, k)),
        ):
            part = entry.quant(slice(*rows), slice(*columns))
            assert part.shape == (rows[1] - rows[0], columns[1] - columns[0])
            assert part.scale.dtype == everything.scale.dtype
            assert torch.equal(part.dequantize(), read[slice(*rows), slice(*columns)])
        assert torch.equal(entry.read((slice(3, 9), slice(33, 50))), read[3:9, 33:50])


def test_act_order_is_dequantized(tmp_path: Path) -> None:
    _, weights = write(tmp_path, Kind("gptq", 4, 32, False, (("desc_act", True),)))
    for name, wanted in weights.items():
        entry = open_checkpoint(tmp_path).entries[name]
        assert entry.scheme is None
        assert entry.quant is None
        torch.testing.assert_close(whole(entry), wanted, rtol=0, atol=2**-11 * 15 * 0.006)
        assert torch.equal(entry.read((slice(4, 11), slice(7, 70))), whole(entry)[4:11, 7:70])


Q, DOWN = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.down_proj"
GPTQ, AWQ, PACKED, INTS = KINDS[0], KINDS[3], KINDS[4], KINDS[7]
Stored = dict[str, Tensor]
About = dict[str, Any]


def drop(name: str) -> Callable[[Stored, About], None]:
    return lambda stored, about: stored.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[Stored, About], None]:
    return lambda stored, about: stored.update({name: tensor})


def say(**values: Any) -> Callable[[Stored, About], None]:
    return lambda stored, about: about.update(values)


def weights(**values: Any) -> Callable[[Stored, About], None]:
    return lambda stored, about: about["config_groups"]["group_0"]["weights"].update(values)


LIES: list[tuple[Kind, Callable[[Stored, About], None], str]] = [
    (GPTQ, drop(f"{Q}.scales"), r"q_proj.scales is missing"),
    (GPTQ, drop(f"{Q}.qweight"), r"q_proj.qweight is missing"),
    (GPTQ, put(f"{Q}.scales", torch.ones(3, 8).half()), r"scales is stored as F16 of shape \[3, 8\]"),
    (GPTQ, put(f"{Q}.scales", torch.ones(5, DIM).half()), "5 scales for a row of 192"),
    (GPTQ, put(f"{Q}.qzeros", torch.ones(3, DIM).int()), r"qzeros is stored as I32 of shape"),
    (GPTQ, put(f"{Q}.qweight", torch.ones(24, DIM)), "qweight is stored as F32"),
    (GPTQ, put(f"{Q}.qweight", torch.ones(DIM).int()), "must be a matrix"),
    (GPTQ, put(f"{Q}.weight", torch.ones(DIM, DIM)), "stored twice"),
    (GPTQ, say(group_size=128), r"int4-g128, but .*_proj is stored with 4 bits"),
    (GPTQ, say(group_size=10), "group_size 10; supported are multiples of 32"),
    (GPTQ, say(bits=3), "has 3 bits; supported are 4 and 8"),
    (GPTQ, say(bits=8), r"is stored with 8 bits a number and \d scales for a row of (96|192)"),
    (GPTQ, say(sym="yes"), "sym 'yes'; it must be true or false"),
    (GPTQ, say(quant_method="bitsandbytes"), "'bitsandbytes', which is not supported"),
    (GPTQ, say(quant_method=["gptq"]), "which is not supported"),
    (GPTQ, say(checkpoint_format="marlin"), "'marlin', which is not supported"),
    (GPTQ, say(dynamic=["-:lm_head"]), "dynamic that is not an object"),
    (GPTQ, say(dynamic={"-:lm_head": {}, "+:.*up": {"bits": 3}}), r"dynamic\['\+:\.\*up'\] has 3 bits"),
    (GPTQ, say(dynamic={".*up": {"quant_method": "awq"}}), r"has quant_method 'awq', which differs"),
    (GPTQ, say(dynamic={".*up": False}), "must be an object of settings"),
    (AWQ, say(version="gemv"), "version 'gemv'; only gemm is supported"),
    (AWQ, say(zero_point=False), "zero_point false"),
    (AWQ, say(modules_to_not_convert=[Q]), "q_proj is stored quantized, although the config excludes"),
    (AWQ, say(modules_to_not_convert=7), "not a list of names"),
    (PACKED, drop(f"{Q}.weight_shape"), "weight_shape is missing"),
    (PACKED, put(f"{Q}.weight_shape", torch.tensor([DIM, 1 << 40])), "of a weight of"),
    (PACKED, put(f"{Q}.weight_shape", torch.tensor([-1, DIM])), "of a weight of"),
    (PACKED, drop(f"{DOWN}.weight_scale"), "weight_scale is missing"),
    (PACKED, say(format="marlin-24"), "'marlin-24', which is not supported"),
    (PACKED, say(format="nvfp4-pack-quantized"), "type 'int'; nvfp4-pack-quantized supports float"),
    (PACKED, say(format="mixed-precision"), "group_0 has format 'None', which is not supported"),
    (PACKED, say(config_groups={}), "that is not empty"),
    (PACKED, say(config_groups={"a": 3}), "must be an object"),
    (PACKED, weights(num_bits=8), r"int8-g64, but .* is stored with 4 bits"),
    (PACKED, weights(type="float"), "'float'; pack-quantized supports int"),
    (PACKED, weights(strategy="block"), "strategy 'block'"),
    (PACKED, weights(symmetric=False), "without zero points"),
    (INTS, put(f"{Q}.weight", torch.ones(DIM, DIM)), "weight is stored as F32"),
    (INTS, put(f"{Q}.weight_scale", torch.ones(7, 1)), r"weight_scale has shape \[7, 1\] for 192 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "lie", "match"), LIES)
def test_config_and_tensors_must_agree(
    kind: Kind, lie: Callable[[Stored, About], None], match: str, tmp_path: Path
) -> None:
    stored, about = write(tmp_path, kind)[0], declared(kind)
    check_disagreement(tmp_path, stored, about, lie, match)


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "match"),
    [
        (GPTQ, f"{Q}.scales", torch.full((3, DIM), torch.nan).half(), "not finite"),
        (GPTQ, f"{Q}.g_idx", torch.zeros(DIM).int(), "g_idx is not in order"),
        (GPTQ, f"{Q}.qzeros", torch.zeros(3, DIM // 8).int(), "not in the middle"),
        (PACKED, f"{Q}.weight_scale", torch.full((DIM, 3), 1e30).bfloat16(), "beyond float16"),
    ],
)
def test_numbers_that_cannot_be_are_refused_as_they_are_read(
    kind: Kind, name: str, tensor: Tensor, match: str, tmp_path: Path
) -> None:
    stored = write(tmp_path, kind)[0]
    save(tmp_path, stored | {name: tensor}, declared(kind))
    entry = open_checkpoint(tmp_path).entries[f"{Q}.weight"]
    with pytest.raises(InputError, match=match):
        whole(entry)


def test_groups_of_columns_must_be_groups(tmp_path: Path) -> None:
    kind = Kind("gptq", 4, 32, True, (("desc_act", True),))
    stored = write(tmp_path, kind)[0]
    save(tmp_path, stored | {f"{DOWN}.g_idx": torch.full((FFN,), 99).int()}, declared(kind))
    with pytest.raises(InputError, match=r"g_idx names groups outside 0..11"):
        whole(open_checkpoint(tmp_path).entries[f"{DOWN}.weight"])


SIDES = [
    (GPTQ, "quantize_config.json", ("quant_method", "checkpoint_format")),
    (AWQ, "quant_config.json", ("quant_method", "modules_to_not_convert")),
    (AWQ, "quantize_config.json", ()),
]


@pytest.mark.parametrize(("kind", "name", "without"), SIDES)
def test_a_file_beside_the_config_says_it_all(
    kind: Kind, name: str, without: tuple[str, ...], tmp_path: Path
) -> None:
    """As the libraries wrote it before config.json had the key; AutoAWQ by other names."""
    stored, wanted = write(tmp_path, kind)
    about = {key: value for key, value in declared(kind).items() if key not in without}
    if name == "quant_config.json":
        about = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    save(tmp_path, stored, None)
    (tmp_path / name).write_text(json.dumps(about))
    checkpoint, outline = open_checkpoint(tmp_path), read_outline(tmp_path)
    assert outline is not None
    assert checkpoint.config["quantization_config"]["quant_method"] == kind.method
    for weight, values in wanted.items():
        entry = checkpoint.entries[weight]
        assert entry.scheme == outline.weights[weight].scheme == Scheme(4, 64, kind.symmetric)
        torch.testing.assert_close(whole(entry), values, rtol=0, atol=2**-11 * 15 * 0.006)
    # What is stored plainly needs no file, whatever this one says.
    (tmp_path / name).write_text("{}")
    save(tmp_path, {n: t for n, t in stored.items() if n.endswith("norm.weight")}, None)
    assert open_checkpoint(tmp_path).entries


def test_modules_with_settings_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: some modules left out, some with other bits and groups."""
    stored, wanted = write(tmp_path, GPTQ)
    other, weight = module(Kind("gptq", 8, 32, False), DIM, FFN, np.random.default_rng(1))
    wanted[f"{DOWN}.weight"] = weight
    stored |= {f"{DOWN}.{end}": tensor for end, tensor in other.items()}
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(Q)}
    stored[f"{Q}.weight"] = wanted[f"{Q}.weight"]
    dynamic = {"-:.*q_proj": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 32, "sym": False}}
    save(tmp_path, stored, declared(GPTQ) | {"dynamic": dynamic})
    checkpoint, outline = open_checkpoint(tmp_path), read_outline(tmp_path)
    assert outline is not None
    schemes = {f"{Q}.weight": None, f"{DOWN}.weight": Scheme(8, 32, symmetric=False)}
    for name, values in wanted.items():
        entry = checkpoint.entries[name]
        assert entry.scheme == outline.weights[name].scheme
        assert entry.scheme == schemes.get(name, Scheme(4, 64))
        torch.testing.assert_close(whole(entry), values, rtol=0, atol=2**-11 * 255 * 0.006)


ENDS = ("k_scale", "v_scale", "q_scale", "k_proj.k_scale", "v_proj.output_scale", "attn.v_zero_point")


@pytest.mark.parametrize("weights_too", [True, False])
def test_scales_of_a_cache_are_left_out(weights_too: bool, tmp_path: Path) -> None:
    stored, wanted = write(tmp_path, INTS)
    about = declared(INTS) | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    about["ignore"] = ["re:.*head"]
    if not weights_too:
        stored = {n: t for n, t in stored.items() if t.dtype == torch.float32} | wanted
        about |= {"config_groups": {}, "format": "dense"}
    scales = {f"{LAYER}self_attn.{end}": torch.ones(1) for end in ENDS}
    save(tmp_path, stored | scales, about)
    checkpoint = open_checkpoint(tmp_path)
    assert [note.partition(",")[0] for note in checkpoint.notes] == ["6 scales of a quantized KV cache"]
    save(tmp_path, stored, about)
    assert checkpoint.entries.keys() == open_checkpoint(tmp_path).entries.keys()
    for name, values in wanted.items():
        assert torch.equal(whole(checkpoint.entries[name]), values)


def test_quantized_weights_need_their_config(tmp_path: Path) -> None:
    save(tmp_path, write(tmp_path, GPTQ)[0], None)
    with pytest.raises(InputError, match="has no quantization_config, but the weights are quantized"):
        open_checkpoint(tmp_path)
