"""The logical form of quantized weights: cutting, joining, rounding, GGUF's blocks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from base.errors import InputError
from tests.weights.block_files import random_blocks
from tests.weights.samples import write_gguf
from weights.open import open_checkpoint
from weights.quant import join_rows
from weights.quantize import quantize_rtn
from weights.schemes import GGUF_SCHEMES as BLOCKS
from weights.schemes import SCHEMES, parse_scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_is_to_the_nearest(name: str) -> None:
    torch.manual_seed(1)
    scheme = parse_scheme(name)
    assert scheme.name == name
    weight = torch.randn(700, 384) * 0.02  # more than one block of rows
    weight[3] = 0
    weight[4] = 1e-12  # its scale is below what a half holds
    quantized = quantize_rtn(weight, scheme)
    stored = quantized.data.numel() * quantized.bits // 8 + quantized.groups.nbytes
    assert stored == scheme.nbytes(700, 384)
    step = quantized.scale.float().repeat_interleave(quantized.group_size, 1)
    error = (quantized.dequantize() - weight).abs()
    # Rounding the scale moves a group's largest numbers by up to 7.5 * 2 ** -11 of a step.
    # The end of a symmetric range without an integer of its own is up to a whole step away.
    most = 1.01 if scheme.bits == 4 and scheme.symmetric else 0.51
    assert bool((error <= step.abs() * most + 1e-7).all())
    assert not quantized.dequantize()[3].any()
    again = quantize_rtn(weight[:, :256], scheme) if scheme.group_size else quantize_rtn(weight, scheme)
    assert torch.equal(again.data, quantized.data[:, : again.data.shape[1]])


def test_rounding_does_not_depend_on_dtype_or_blocks() -> None:
    weight = (torch.randn(900, 512) * 0.02).bfloat16()
    for name in SCHEMES:
        scheme = parse_scheme(name)
        whole = quantize_rtn(weight, scheme)
        parts = [quantize_rtn(weight[a:b].float(), scheme) for a, b in ((0, 1), (1, 600), (600, 900))]
        joined = join_rows(parts)
        assert torch.equal(joined.data, whole.data)
        assert torch.equal(joined.scale, whole.scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g64-asym"])
def test_what_is_no_weight_is_not_rounded(bad: float, name: str) -> None:
    weight = torch.ones(4, 64)
    weight[2, 7] = bad
    with pytest.raises(InputError, match="cannot be quantized"):
        quantize_rtn(weight, parse_scheme(name))


@pytest.mark.parametrize("name", SCHEMES)
def test_columns_and_rows_are_cut_bit_for_bit(name: str) -> None:
    quantized = quantize_rtn(torch.randn(40, 512) * 0.02, parse_scheme(name))
    whole = quantized.dequantize()
    cuts = (0, 96, 128, 352, 512)
    parts = [quantized.columns(a, b) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), whole)
    assert torch.equal(join_rows([quantized.rows(0, 3), quantized.rows(3, 40)]).dequantize(), whole)
    padded = quantized.padded(48).dequantize()
    assert torch.equal(padded[:40], whole)
    assert not padded[40:].any()


def test_a_cut_within_the_least_group_is_refused() -> None:
    quantized = quantize_rtn(torch.randn(4, 256), parse_scheme("int4-g64"))
    with pytest.raises(InputError, match="use another number of ranks"):
        quantized.columns(48, 256)
    with pytest.raises(InputError, match="not a scheme that Yoke has"):
        parse_scheme("int8-g77")


@pytest.mark.parametrize("form", sorted(BLOCKS))
def test_a_gguf_file_is_read_in_its_blocks(form: str, tmp_path: Path) -> None:
    raw = random_blocks(form, np.random.default_rng(3), 4 * 16, 512)
    values = torch.from_numpy(dequantize(raw, Kind[form]))
    values = values.view(4, 8, 2, 512).transpose(1, 2).reshape(64, 512)  # in halves of each head
    name = "blk.0.attn_q.weight"
    path = write_gguf(tmp_path / "m.gguf", {name: raw}, {name: Kind[form]}, "llama")
    entry = open_checkpoint(path).entries["model.layers.0.self_attn.q_proj.weight"]
    assert entry.scheme == BLOCKS[form]
    assert entry.quant is not None
    for rows in (slice(0, 64), slice(5, 23), slice(16, 48), slice(4, 4)):
        for columns in (slice(0, 512), slice(32, 288)):
            part = entry.quant(rows, columns)
            assert torch.equal(part.dequantize(), values[rows, columns])
