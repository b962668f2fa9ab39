"""GGUF's block forms: the bytes, read by the gguf package; errors, against plain rounding and against
the best that trying everything finds."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from quantize.gguf_pack import BLOCK_BYTES, to_blocks
from quantize.gguf_recipe import RECIPES, Dimensions, form_of, needs_more
from quantize.gguf_search import quantize_rows

FORMS = tuple(BLOCK_BYTES)


def weights(n: int = 16, k: int = 512, seed: int = 0) -> Tensor:
    """Rows as trained models have them: normal numbers, some columns of them larger."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(n, k, generator=generator) * 0.02
    found[:, ::37] *= 4
    return found


def importance(k: int = 512) -> Tensor:
    return torch.rand(k, generator=torch.Generator().manual_seed(1)).pow(4) * 10


def by_package(form: str, stored: Tensor) -> Tensor:
    return torch.from_numpy(dequantize(stored.numpy(), gguf.GGMLQuantizationType[form]))


def plain(form: str, weight: Tensor) -> Tensor:
    """What the gguf package's rounding to the nearest makes of a weight."""
    kind = gguf.GGMLQuantizationType[form]
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))


def error(found: Tensor, weight: Tensor, by: Tensor | float = 1.0) -> float:
    return float(((found - weight).square() * by).sum())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("important", [False, True])
def test_the_package_reads_the_numbers_that_were_chosen(form: str, important: bool) -> None:
    weight = weights(5)
    chosen = quantize_rows(form, weight, importance() if important else None)
    stored = to_blocks(form, chosen)
    assert torch.equal(by_package(form, stored), chosen.dequantize())
    block, size = BLOCK_BYTES[form]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]] == (block, size)
    assert stored.shape == (5, 512 // block * size) and stored.dtype == torch.uint8


@pytest.mark.parametrize("form", FORMS)
def test_every_bit_of_a_block_has_its_place(form: str) -> None:
    """Codes and integers of all values, not only those that a search chooses."""
    generator = torch.Generator().manual_seed(2)
    chosen = quantize_rows(form, weights(4))

    def scrambled(each: Tensor) -> Tensor:
        if each.dtype.is_floating_point:
            return each
        most = 127 if each.dtype == torch.int8 else 63 if each is not chosen.data else 15
        if each is chosen.data and form[1] in "56":
            most = 31 if form[1] == "5" else 63
        return torch.randint(0, most + 1, each.shape, generator=generator).to(each.dtype)

    mixed = chosen.with_rows(scrambled)
    assert torch.equal(by_package(form, to_blocks(form, mixed)), mixed.dequantize())


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_searched_scales_are_better_than_those_of_the_range(form: str) -> None:
    weight = weights()
    assert error(quantize_rows(form, weight).dequantize(), weight) < error(plain(form, weight), weight)


def test_k_quants_are_better_than_forms_of_more_bits() -> None:
    """Their scales take a quarter of a bit less a number than those of blocks of 32."""
    weight = weights()
    for form, other in (("Q4_K", "Q4_1"), ("Q5_K", "Q5_1")):
        assert error(quantize_rows(form, weight).dequantize(), weight) < error(
            plain(other, weight), weight
        )
    grouped = weight.view(16, -1, 16)
    scale = grouped.abs().amax(-1, keepdim=True) / 31
    covered = ((grouped / scale).round() * scale).view_as(weight)  # with exact scales for free
    assert error(quantize_rows("Q6_K", weight).dequantize(), weight) < error(covered, weight)


@pytest.mark.parametrize("form", ["Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_importance_lowers_the_weighted_error(form: str) -> None:
    weight, by = weights(), importance()
    with_it = error(quantize_rows(form, weight, by).dequantize(), weight, by)
    assert with_it < 0.95 * error(quantize_rows(form, weight).dequantize(), weight, by)


def best_symmetric(group: Tensor, low: int, high: int, by: Tensor) -> float:
    """The least error of a group [size] over all float16 scales near those that can be good."""
    peak = float(group.abs().max())
    sizes = torch.linspace(peak / high / 4, 2 * peak / high, 3000).half().float()
    scales = torch.cat([sizes, -sizes]).unsqueeze(1)
    codes = (group / scales).round().clamp(low, high)
    return float(((codes * scales - group).square() * by).sum(1).min())


def best_affine(group: Tensor, top: int, by: Tensor, any_offset: bool) -> float:
    """As `best_symmetric`, with an offset: scales and offsets are a fine grid of float32 numbers."""
    low, high = float(group.min()), float(group.max())
    low = low if any_offset else min(low, 0.0)
    span = high - low
    scale = torch.linspace(0.6 * span / top, 1.2 * span / top, 120).view(-1, 1, 1)
    offset = torch.linspace(low - 0.1 * span, low + 0.3 * span, 160).view(1, -1, 1)
    offset = offset if any_offset else offset.clamp(max=0)
    codes = ((group - offset) / scale).round().clamp(0, top)
    return float(((codes * scale + offset - group).square() * by).sum(-1).min())


@pytest.mark.parametrize("form", ["Q4_0", "Q5_0"])
def test_scales_are_near_the_best_of_all(form: str) -> None:
    weight, by, top = weights(6, 64), importance(64).sqrt(), 16 if form == "Q5_0" else 8
    found = (quantize_rows(form, weight, by).dequantize() - weight).square() * by
    best = [
        best_symmetric(group, -top, top - 1, used)
        for row in weight
        for group, used in zip(row.split(32), by.split(32), strict=True)
    ]
    assert float(found.sum()) <= 1.06 * sum(best)


@pytest.mark.parametrize("form", ["Q4_1", "Q5_1"])
def test_scales_and_offsets_are_near_the_best_of_all(form: str) -> None:
    weight, by, top = weights(2, 256), importance(256).sqrt(), 31 if form[1] == "5" else 15
    found = (quantize_rows(form, weight, by).dequantize() - weight).square() * by
    best = [
        best_affine(group, top, used, any_offset=True)
        for row in weight
        for group, used in zip(row.split(32), by.split(32), strict=True)
    ]
    assert float(found.sum()) <= 1.25 * sum(best)


def best_integers(group: Tensor, scale: float, least: float, top: int, by: Tensor) -> float:
    """The least error of a group [32] over all scales and minimums of 6 bits, for the factors of its
    super-group."""
    integers = torch.arange(64).float()
    step = (scale * integers).view(-1, 1, 1)
    offset = (least * integers).view(1, -1, 1)
    codes = ((group - offset) / torch.where(step == 0, 1.0, step)).round().clamp(0, top)
    return float(((codes * step + offset - group).square() * by).sum(-1).min())


@pytest.mark.parametrize("form", ["Q4_K", "Q5_K"])
def test_integers_of_groups_are_near_the_best_for_their_super_group(form: str) -> None:
    weight, by, top = weights(2, 256), importance(256).sqrt(), 31 if form[1] == "5" else 15
    quantized = quantize_rows(form, weight, by)
    found = (quantized.dequantize() - weight).square() * by
    assert quantized.supers is not None and quantized.supers.offset is not None
    best = [
        best_integers(group, float(scale), float(least), top, used)
        for row, scale, least in zip(
            weight, quantized.supers.scale[:, 0], quantized.supers.offset[:, 0], strict=True
        )
        for group, used in zip(row.split(32), by.split(32), strict=True)
    ]
    # The search tries integers beside the nearest ones only: Q5_K was 12 % above the best of all.
    assert float(found.sum()) <= 1.15 * sum(best)


@pytest.mark.parametrize("form", FORMS)
def test_unusual_rows(form: str) -> None:
    rows = torch.zeros(6, 256)
    rows[1] = 3.0
    rows[2] = -2.5
    rows[3, 100] = 1.0
    rows[4] = 1e-9
    rows[5] = torch.linspace(1000, 4000, 256)
    for by in (None, torch.zeros(256), importance(256)):
        found = by_package(form, to_blocks(form, quantize_rows(form, rows, by)))
        assert found.isfinite().all() and torch.equal(found[0], rows[0])
        assert torch.allclose(found[1:3], rows[1:3], rtol=0.02)
        assert torch.allclose(found[3], rows[3], atol=0.1) and found[4].abs().max() < 1e-6
        assert torch.allclose(found[5], rows[5], rtol=0.2)


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(8)
    for form in FORMS:
        whole = to_blocks(form, quantize_rows(form, weight))
        monkeypatch.setattr("quantize.gguf_search._PIECE", 1024)
        assert torch.equal(to_blocks(form, quantize_rows(form, weight)), whole)
        monkeypatch.undo()


def test_recipes() -> None:
    model = Dimensions(32, 0, True, False)
    assert [i for i in range(32) if needs_more(i, 32)] == [
        0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31,
    ]  # fmt: skip
    for name, k, recipe, form in (
        ("blk.0.attn_v.weight", 4096, "Q4_K_M", "Q6_K"),
        ("blk.4.attn_v.weight", 4096, "Q4_K_M", "Q4_K"),
        ("blk.6.ffn_down.weight", 11008, "Q5_K_M", "Q6_K"),
        ("blk.5.ffn_down.weight", 11008, "Q5_K_M", "Q5_K"),
        ("blk.0.ffn_up.weight", 4096, "Q4_K_M", "Q4_K"),
        ("output.weight", 4096, "Q4_K_M", "Q6_K"),
        ("output.weight", 4096, "Q4_0", "Q6_K"),
        ("output.weight", 4096, "Q8_0", "Q8_0"),
        ("token_embd.weight", 4096, "Q4_K_M", "Q4_K"),
        ("blk.0.attn_qkv.weight", 4096, "Q4_K_M", "Q5_K"),
        # Rows that are not whole blocks of 256, or of 32.
        ("blk.4.attn_q.weight", 576, "Q4_K_M", "Q5_0"),
        ("blk.4.attn_q.weight", 576, "Q5_K_M", "Q5_1"),
        ("blk.0.attn_v.weight", 576, "Q4_K_M", "Q8_0"),
        ("blk.4.attn_q.weight", 576, "Q4_0", "Q4_0"),
        ("blk.4.attn_q.weight", 80, "Q4_0", "F16"),
        ("blk.4.ffn_gate_inp.weight", 4096, "Q4_0", "F32"),
    ):
        assert form_of(name, (64, k), RECIPES[recipe], model) == form, (name, k, recipe)
    assert form_of("blk.0.attn_norm.weight", (4096,), RECIPES["Q4_0"], model) == "F32"
    tied = Dimensions(32, 0, True, True)
    assert form_of("token_embd.weight", (64, 4096), RECIPES["Q4_K_M"], tied) == "Q6_K"
    experts = Dimensions(32, 8, True, False)
    for name, form in (
        ("blk.4.attn_k.weight", "Q8_0"),
        ("blk.4.attn_output.weight", "Q5_K"),
        ("blk.0.ffn_down_exps.weight", "Q6_K"),
        ("blk.4.ffn_up_exps.weight", "Q4_K"),
    ):
        assert form_of(name, (8, 64, 4096), RECIPES["Q4_K_M"], experts) == form
