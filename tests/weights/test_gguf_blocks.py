"""GGUF's blocks as quantized weights, against the gguf package: values, borders, damage."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from base.errors import InputError
from kernels import quant_linear
from tests.weights.block_files import (
    FLOATS,
    KEPT,
    Blocks,
    down_file,
    num_scales,
    random_blocks,
    set_scale,
)
from weights.checkpoint import Entry
from weights.formats import gguf_blocks
from weights.formats.gguf_blocks import FORMS, from_blocks, values_of_blocks
from weights.open import open_checkpoint
from weights.outline import read_outline
from weights.quant import QuantWeight
from weights.schemes import CODES, GGUF_SCHEMES

SMALL = (  # of these, memory holds little more than the file
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "MXFP4",
)  # fmt: skip
INFINITE, NAN, ZERO, NEGATIVE_ZERO = 0x7C00, 0xFE01, 0, 0x8000
DOWN = "model.layers.0.mlp.down_proj.weight"
seeds = st.integers(0, 2**32 - 1)
forms = st.sampled_from(KEPT)


def by_the_package(raw: Blocks, form: str) -> Tensor:
    return torch.from_numpy(dequantize(np.ascontiguousarray(raw), Kind[form]))


def entry_of(folder: Path, form: str, raw: Blocks) -> Entry:
    return open_checkpoint(down_file(folder / "m.gguf", form, raw)).entries[DOWN]


def test_the_tables_agree() -> None:
    assert set(FORMS) == set(GGUF_SCHEMES) == set(KEPT)
    for name, form in FORMS.items():
        assert (form.numbers, form.bytes) == GGML_QUANT_SIZES[Kind[name]]
        assert GGUF_SCHEMES[name].bits == CODES[GGUF_SCHEMES[name].code_name].bits


@settings(deadline=None)
@given(forms, seeds, st.integers(1, 40), st.integers(1, 4))
def test_values_are_those_of_the_package(form: str, seed: int, rows: int, blocks: int) -> None:
    k = blocks * FORMS[form].numbers
    raw = random_blocks(form, np.random.default_rng(seed), rows, k)
    weight = from_blocks(torch.from_numpy(raw), form)
    wanted = by_the_package(raw, form)
    assert weight.shape == (rows, k)
    assert torch.equal(weight.dequantize(), wanted)
    assert torch.equal(values_of_blocks(torch.from_numpy(raw), form, "here"), wanted)


@pytest.mark.parametrize("form", KEPT)
def test_a_weight_is_as_its_scheme_says(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, k = 24, 1024
    scheme = GGUF_SCHEMES[form]
    raw = random_blocks(form, np.random.default_rng(1), rows, k)
    weight = from_blocks(torch.from_numpy(raw), form)
    assert (weight.codes, weight.groups.size) == (scheme.code_name, scheme.group_size)
    assert (weight.groups.kind, weight.offset is None) == (scheme.scale_kind, scheme.symmetric)
    assert weight.scale.shape == (rows, k // scheme.group_size)
    assert (weight.supers is not None) == bool(scheme.super_scales)
    if weight.supers is not None:
        assert (weight.supers.kind, weight.supers.size) == (scheme.super_scales, scheme.super_size)
        assert (weight.supers.offset is None) == scheme.symmetric
    if scheme.bits < 8:
        assert weight.data.max() < 1 << scheme.bits
    if form in SMALL:
        assert raw.nbytes <= scheme.nbytes(rows, k) <= 1.06 * raw.nbytes
    assert scheme.nbytes(rows, k) < 1.1 * rows * k  # at most 8 bits and the scales
    kinds = [each for each in (weight.groups, weight.supers) if each is not None]
    held = sum(each.nbytes / (2 if each.kind == "u4" else 1) for each in kinds)
    assert scheme.nbytes(rows, k) == rows * k * weight.bits // 8 + held
    monkeypatch.setattr(quant_linear, "has_kernels", lambda: False)
    (again,) = quant_linear.unpack(quant_linear.pack(weight))
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("form", KEPT)
def test_rows_are_unpacked_in_pieces(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.from_numpy(random_blocks(form, np.random.default_rng(2), 41, 512))
    whole = from_blocks(raw, form)
    monkeypatch.setattr(gguf_blocks, "_AT_ONCE", 512 * 10)
    pieces = from_blocks(raw, form)
    assert torch.equal(pieces.data, whole.data)
    assert torch.equal(pieces.dequantize(), whole.dequantize())
    size = FORMS[form].bytes
    some = raw[3:17, size:]  # rows that are not contiguous
    assert torch.equal(from_blocks(some, form).data, whole.data[3:17, FORMS[form].numbers :])
    empty = from_blocks(raw[:0], form)
    assert empty.shape == (0, 512)
    assert empty.scale.shape == (0, whole.scale.shape[1])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forms, seeds, st.data())
def test_a_part_of_a_file(tmp_path: Path, form: str, seed: int, data: st.DataObject) -> None:
    """Any rows, and columns with borders between groups, inside a super-block, too."""
    stacked = data.draw(st.booleans())
    shape = (3, 12, 1024) if stacked else (12, 1024)
    raw = random_blocks(form, np.random.default_rng(seed), shape[0] * 12 if stacked else 12, 1024)
    raw = raw.reshape(*shape[:-1], -1)
    checkpoint = open_checkpoint(down_file(tmp_path / "m.gguf", form, raw))
    index = data.draw(st.integers(0, 2)) if stacked else 0
    name = DOWN.replace("down_proj", f"experts.{index}.down_proj") if stacked else DOWN
    entry = checkpoint.entries[name]
    wanted = by_the_package(raw[index] if stacked else raw, form)
    unit = GGUF_SCHEMES[form].unit
    borders = st.lists(st.integers(0, 1024 // unit), min_size=2, max_size=2, unique=True).map(sorted)
    first, last = (unit * border for border in data.draw(borders))
    rows = slice(*sorted(data.draw(st.tuples(st.integers(0, 12), st.integers(0, 12)))))
    assert entry.scheme == GGUF_SCHEMES[form]
    assert entry.quant is not None and entry.scheme.can_cut(first, last)
    part = entry.quant(rows, slice(first, last))
    assert torch.equal(part.dequantize(), wanted[rows, first:last])
    read = entry.read((rows, slice(first, last)))
    assert torch.equal(read, wanted[rows, first:last])
    within = data.draw(st.integers(1, unit - 1))
    with pytest.raises(InputError, match=f"multiples of {unit}"):
        entry.quant(rows, slice(0, last - within))


@pytest.mark.parametrize("form", [*KEPT, "TQ1_0"])
@pytest.mark.parametrize("shape", [(512,), (8, 512), (2, 8, 512)])
def test_the_outline_is_that_of_the_entries(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    rows = random_blocks(form, np.random.default_rng(3), math.prod(shape[:-1]), 512)
    path = down_file(tmp_path / "m.gguf", form, rows.reshape(*shape[:-1], rows.shape[1]))
    outline, entries = read_outline(path), open_checkpoint(path).entries
    assert outline is not None
    assert outline.weights.keys() == entries.keys()
    for name, entry in entries.items():
        stored = outline.weights[name]
        assert (stored.stored_as, stored.scheme) == (entry.stored_as, entry.scheme)
        assert (entry.scheme is not None) == (form in KEPT and len(shape) > 1)


def readings(entry: Entry, rows: slice, k: int) -> tuple[Tensor, QuantWeight]:
    assert entry.quant is not None
    return entry.read((rows, slice(0, k))), entry.quant(rows, slice(0, k))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forms, seeds, st.sampled_from([INFINITE, INFINITE | 0x8000, NAN, 0x7FFF]), st.data())
def test_a_damaged_scale(tmp_path: Path, form: str, seed: int, half: int, data: st.DataObject) -> None:
    raw = random_blocks(form, np.random.default_rng(seed), 8, 512)
    row, block = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 512 // FORMS[form].numbers - 1))
    which = data.draw(st.integers(0, num_scales(form) - 1))
    set_scale(raw, form, row, block, which, FLOATS[form][1] if form in FLOATS else half)
    entry = entry_of(tmp_path, form, raw)
    match = r"m\.gguf: 'blk\.0\.ffn_down\.weight' is damaged: .*" + form + " .*copy the file again"
    assert entry.quant is not None
    with pytest.raises(InputError, match=match):
        entry.quant(slice(0, 8), slice(0, 512))
    with pytest.raises(InputError, match=match):
        entry.read((slice(row, 8), slice(0, 512)))
    values, weight = readings(entry, slice(0, row), 512)  # a rank that does not hold the row
    assert torch.equal(values, weight.dequantize())


@pytest.mark.parametrize("form", KEPT)
@pytest.mark.parametrize("half", [ZERO, NEGATIVE_ZERO, 0x0001, 0x7BFF])
def test_a_scale_that_is_small_or_large(form: str, half: int, tmp_path: Path) -> None:
    """Zero, the smallest and the largest finite float16."""
    raw = random_blocks(form, np.random.default_rng(4), 4, 256)
    for which in range(num_scales(form)):
        set_scale(raw, form, 2, 0, which, half & 0x7E if form in FLOATS else half)
    values, weight = readings(entry_of(tmp_path, form, raw), slice(0, 4), 256)
    wanted = by_the_package(raw, form)
    assert torch.equal(values, wanted) and torch.equal(weight.dequantize(), wanted)
    assert bool(wanted.isfinite().all())


@pytest.mark.parametrize("form", ["TQ1_0", "TQ2_0"])
def test_what_is_only_dequantized(form: str, tmp_path: Path) -> None:
    raw = random_blocks(form, np.random.default_rng(5), 4, 512)
    entry = entry_of(tmp_path, form, raw)
    assert (entry.scheme, entry.quant, entry.stored_as) == (None, None, form)
    assert torch.equal(entry.read((slice(0, 4), slice(0, 512))), by_the_package(raw, form))
    set_scale(raw, form, 3, 1, 0, INFINITE)
    entry = entry_of(tmp_path, form, raw)
    with pytest.raises(InputError, match=r"m\.gguf: 'blk\.0\.ffn_down\.weight' is damaged"):
        entry.read((slice(0, 4), slice(0, 512)))
    assert entry.read((slice(0, 3), slice(0, 512))).isfinite().all()
