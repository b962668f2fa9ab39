"""Matmuls with quantized weights: any shape and form, on every instruction set, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import InputError
from kernels.load import load_kernels
from kernels.packed import pack_bf16, packed_rows
from kernels.quant_linear import (
    KINDS,
    Packed,
    dequantize,
    pack,
    pack_codes_reference,
    quant_linear,
    quant_linear_reference,
    unpack,
)
from tests.kernels.forms import FORMS, allowed, random_weight, terms
from tests.kernels.sets import EACH, SETS, parameters
from weights.quant import Factors, QuantWeight
from weights.schemes import CODES, GGUF_SCHEMES, Scheme

assert load_kernels()
OPS = torch.ops.yoke_kernels
WITH_TILES = parameters("avx512bf16", "amx")
FORM = pytest.mark.parametrize("form", FORMS)
FOUR = Scheme(4, 32)


def random_x(m: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check(
    x: torch.Tensor, weight: QuantWeight, bias: torch.Tensor | None, name: str = SETS[-1]
) -> None:
    OPS.use_instruction_set(name)
    got = quant_linear(x, pack(weight), bias)
    wanted = x.double() @ weight.dequantize(torch.float64).T
    bound = allowed(x, weight, wanted, name)
    if weight.offset is not None:  # `dequantize` rounds to float32
        bound = bound + x.double().abs() @ weight.dequantize(torch.float64).abs().T * 2**-22
    if bias is not None:
        wanted += bias.double()
        bound = bound + bias.double().abs() * 2**-8
    assert got.dtype == torch.bfloat16 and got.shape == (*x.shape[:-1], weight.shape[0])
    assert ((got.double() - wanted).abs() <= bound).all()


def columns_of(scheme: Scheme, units: int) -> int:
    """A legal number of columns: whole groups, or (of super-groups) whole small groups."""
    size = scheme.group_size or 32
    return size * units if size >= 32 else 16 * units


@FORM
@pytest.mark.parametrize("name", EACH)
@settings(max_examples=8, deadline=None)
@given(
    m=st.sampled_from([1, 2, 3, 4, 5, 7, 16, 17, 64]),
    n=st.integers(1, 150),
    units=st.integers(1, 20),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(
    name: str, form: str, m: int, n: int, units: int, with_bias: bool, seed: int
) -> None:
    k = columns_of(FORMS[form], units)
    weight = random_weight(FORMS[form], n, k, seed)
    bias = torch.randn(n).bfloat16() if with_bias else None
    check(random_x(m, k, seed), weight, bias, name)


# Past the sizes at which the way changes: 15 rows, 120 and 512 rows at a time, 256 numbers of k at a
# time, four panels, sums of 4 MiB; and at each with remainders.
@pytest.mark.parametrize("name", SETS[-2:])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(15, 129, 288), (16, 95, 544), (125, 40, 512), (241, 33, 320), (520, 2090, 64)]
)
@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "int8", "Q4_K", "Q6_K", "fp8"])
def test_at_the_borders(name: str, form: str, m: int, n: int, k: int) -> None:
    check(random_x(m, k, m), random_weight(FORMS[form], n, k, m), torch.randn(n).bfloat16(), name)


@pytest.mark.parametrize("name", EACH)
@FORM
def test_cut_weights_are_multiplied_like_whole_ones(name: str, form: str) -> None:
    """Borders inside groups and super-groups, at each place where they may be."""
    scheme = FORMS[form]
    weight = random_weight(scheme, 70, 768, 3)
    exact = weight.dequantize(torch.float64)
    unit = scheme.unit
    for start, stop in ((unit, 768), (0, 256 + unit), (5 * unit, 21 * unit), (32, 320), (256, 512)):
        part = weight.rows(3, 64).columns(start, stop)
        assert torch.equal(part.dequantize(torch.float64), exact[3:64, start:stop])
        assert torch.equal(dequantize(pack(part)), part.dequantize())
        check(random_x(3, stop - start, 3), part, None, name)


@FORM
def test_borders_inside_a_small_group_are_refused(form: str) -> None:
    scheme = FORMS[form]
    weight = random_weight(scheme, 8, 512, 0)
    for start, stop in ((8, 512), (0, 256 + 8), (scheme.unit // 2, 512)):
        with pytest.raises(InputError, match=f"multiples of {scheme.unit}.*number of ranks"):
            weight.columns(start, stop)


@FORM
@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 150), units=st.integers(1, 20), seed=st.integers(0, 99))
def test_what_is_packed_can_be_unpacked(form: str, n: int, units: int, seed: int) -> None:
    weight = random_weight(FORMS[form], n, columns_of(FORMS[form], units), seed)
    packed = pack(weight)
    (again,) = unpack(packed)
    assert torch.equal(again.data, weight.data) and again.codes == weight.codes
    for mine, other in ((again.groups, weight.groups), (again.supers, weight.supers)):
        assert (mine is None) == (other is None)
        if mine is None or other is None:
            continue
        assert torch.equal(mine.scale, other.scale) and mine.scale.dtype == other.scale.dtype
        assert (mine.offset is None) == (other.offset is None)
        if mine.offset is not None and other.offset is not None:
            assert torch.equal(mine.offset, other.offset)
        assert (mine.size, mine.kind, mine.skip) == (other.size, other.kind, other.skip)
    ((part, panels),) = packed.each()
    codes = panels.split(part.sections(), dim=1)[0]
    assert torch.equal(codes, pack_codes_reference(weight.data, weight.codes))


@pytest.mark.parametrize("form", GGUF_SCHEMES)
def test_memory_is_at_most_six_percent_more_than_in_the_file(form: str) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType.__members__.get(form)
    if kind is None or form.startswith(("IQ1", "IQ2", "IQ3")):
        pytest.skip("codebooks take 8 bits")
    block, size = GGML_QUANT_SIZES[kind]
    held = pack(random_weight(FORMS[form], 64, 4096, 0)).nbytes
    assert held == FORMS[form].nbytes(64, 4096)
    assert held <= 1.06 * 64 * 4096 / block * size


@pytest.mark.parametrize("codes", [name for name in CODES if CODES[name].bits < 8])
def test_the_layout_is_the_one_that_is_drawn(codes: str) -> None:
    """A code is found in the planes of csrc/quant.h."""
    bits = CODES[codes].bits
    q = torch.randint(0, 1 << bits, (70, 96), dtype=torch.uint8)
    tiles = pack_codes_reference(q, codes).view(3, 3, 2, bits * 64)
    for n, k in ((0, 0), (15, 31), (16, 33), (37, 64), (69, 95), (50, 43)):
        tile = tiles[n // 32, k // 32, n // 16 % 2].contiguous().view(torch.int32).view(bits, 16)
        pair, odd = k % 32 // 2, k % 2
        four, nibble = pair // 4, pair % 4 + 4 * odd
        low = 2 if bits < 4 else 4
        # Where planes of 4, 2 and 1 bits have this number: (register, lowest bit of the lane).
        places = {
            4: (four, 4 * nibble),
            2: (four // 2, 8 * (nibble // 2) + 4 * (four % 2) + 2 * (nibble % 2)),
            1: (0, 8 * (nibble // 2) + 2 * four + nibble % 2),
        }
        word, shift = places[low]
        found = int(tile[word, n % 16]) >> shift & ((1 << low) - 1)
        if bits > low:
            word, shift = places[bits - low]
            found |= (int(tile[low + word, n % 16]) >> shift & ((1 << (bits - low)) - 1)) << low
        assert found == int(q[n, k])


def test_bytes_and_factors_are_where_they_are_drawn() -> None:
    """Codes of 8 bits, and the sections of factors behind them: rows that pad have scales of zero."""
    weight = random_weight(FORMS["int8-g64-asym"], 70, 192, 0)
    ((part, panels),) = pack(weight).each()
    codes, *empty, scales, offsets = panels.split(part.sections(), dim=1)
    assert not any(section.numel() for section in empty)
    tiles = codes.reshape(3, 6, 2, 16, 16, 2).view(torch.int8)
    for n, k in ((0, 0), (15, 31), (16, 33), (37, 64), (69, 191), (50, 43)):
        assert tiles[n // 32, k // 32, n // 16 % 2, k % 32 // 2, n % 16, k % 2] == weight.data[n, k]
    for section, factor in ((scales, weight.scale), (offsets, weight.offset)):
        assert factor is not None
        drawn = section.contiguous().view(torch.float16).view(3, 3, 2, 16)
        for n, group in ((0, 0), (17, 2), (69, 1), (40, 0)):
            assert drawn[n // 32, group, n // 16 % 2, n % 16] == factor[n, group]
        assert not drawn.permute(0, 2, 3, 1).flatten(0, 2)[70:].any()


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("m", [1, 3, 9, 40])
def test_parts_of_different_forms_are_one_call(name: str, m: int) -> None:
    """As one matmul for each part, bit for bit."""
    OPS.use_instruction_set(name)
    weights = [
        random_weight(FORMS[form], n, 512, n)
        for form, n in (("Q4_K", 70), ("Q6_K", 33), ("int8", 1), ("Q4_0", 64), ("fp8", 40))
    ]
    plain = torch.randn(50, 512).bfloat16()
    packed = pack(*weights)
    rows = sum(weight.shape[0] for weight in weights)
    both = Packed(torch.cat([packed.data, pack_bf16(plain).data.view(-1)]),
                  (*packed.parts, *pack_bf16(plain).parts))  # fmt: skip
    x, bias = random_x(m, 512, 0), torch.randn(rows + 50).bfloat16()
    got = quant_linear(x, both, bias)
    wanted, start = [], 0
    for one in (*map(pack, weights), pack_bf16(plain)):
        wanted.append(quant_linear(x, one, bias[start : start + one.num_rows]))
        start += one.num_rows
    assert torch.equal(got, torch.cat(wanted, dim=-1))
    assert torch.equal(dequantize(both)[rows:], plain.float())


@FORM
def test_rows_are_looked_up_as_they_are_dequantized(form: str) -> None:
    weight = random_weight(FORMS[form], 70, 512, 1)
    tokens = torch.tensor([[0, 69, 33], [5, 70, 200]])
    got = packed_rows(tokens, pack(weight), 0, 70)
    wanted = weight.dequantize(torch.bfloat16)
    assert torch.equal(got[0], wanted[tokens[0]]) and torch.equal(got[1, 0], wanted[5])
    assert not got[1, 1:].any()


def test_an_offset_that_no_half_holds() -> None:
    weight = random_weight(Scheme(4, 32, symmetric=False), 40, 64, 5)
    assert weight.offset is not None
    factors = Factors(32, weight.scale, weight.offset.float() * 1e6)
    mixed = replace(weight, groups=factors)
    assert KINDS[pack(mixed).parts[0].group_kind] == "f32"
    check(random_x(2, 64, 5), mixed, None)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("form", ["int4-g64", "int8-g64-asym", "Q4_K", "Q6_K", "Q2_K", "MXFP4", "fp8"])
def test_a_row_is_the_same_whatever_the_others_are(name: str, form: str) -> None:
    """Bit for bit among numbers of rows that go the same way."""
    OPS.use_instruction_set(name)
    packed, x = pack(random_weight(FORMS[form], 70, 320, 1)), random_x(131, 320, 1)
    ways = [(1, 4), (5, 16), (17, 131)] if name == "amx" else [(1, 15), (16, 131)]
    for least, most in ways:
        wanted = quant_linear(x[:most], packed)
        for count in {least, least + 1, (least + most) // 2, most}:
            for start in {0, (most - count) // 2, most - count}:
                got = quant_linear(x[start : start + count], packed)
                assert torch.equal(got, wanted[start : start + count])


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("m", [2, 7, 40])
def test_what_is_not_finite_stays_in_its_row(name: str, m: int) -> None:
    OPS.use_instruction_set(name)
    weight, x = random_weight(FOUR, 50, 160, 2), random_x(m, 160, 2)
    wanted = quant_linear(x, pack(weight))
    for bad in (float("nan"), float("inf"), float("-inf")):
        hurt = x.clone()
        hurt[1, 70] = bad
        got = quant_linear(hurt, pack(weight))
        assert not got[1].isfinite().any()
        got[1] = wanted[1]
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", EACH)
def test_rows_of_zeros_and_of_tiny_numbers(name: str) -> None:
    OPS.use_instruction_set(name)
    weight, x = random_weight(FORMS["Q4_1"], 50, 160, 3), random_x(3, 160, 3)
    x[1] = 0
    x[2] *= 1e-36
    got = quant_linear(x, pack(weight))
    assert (got[1] == 0).all() and (got[2].abs() < 1e-30).all() and got[0].abs().min() > 0


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("rows", [2, 40])
def test_many_threads_make_the_same(name: str, rows: int) -> None:
    OPS.use_instruction_set(name)
    x, packed = random_x(rows, 640, 0), pack(random_weight(FOUR, 1003, 640, 0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quant_linear(x, packed)
        torch.set_num_threads(3)
        three = quant_linear(x, packed)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(three, one)


@pytest.mark.parametrize("name", WITH_TILES)
@FORM
@pytest.mark.parametrize("units", [1, 7, 18])
def test_tiles_are_the_weights_rounded(name: str, form: str, units: int) -> None:
    """Within a unit of bfloat16 of the exact ones (float32 in between), values alone exactly."""
    OPS.use_instruction_set(name)
    k = columns_of(FORMS[form], units)
    weight = random_weight(FORMS[form], 70, k, units)
    packed = pack(weight)
    tiles = OPS.quant_tiles(packed.data, packed.numbers)
    got = tiles.permute(0, 2, 4, 1, 3, 5).reshape(96, -1)[:70, :k].double()
    if packed.parts[0].group_kind == 0 and weight.groups.scale.shape[1] == 1 and weight.offset is None:
        assert torch.equal(got, weight.values().double())
        return
    wanted = weight.dequantize(torch.float64)
    assert ((got - wanted).abs() <= wanted.abs() * 2**-8 + terms(weight) * 2**-22).all()


@pytest.mark.parametrize("name", EACH)
def test_bfloat16_in_the_same_layout(name: str) -> None:
    OPS.use_instruction_set(name)
    weight = torch.randn(90, 160).bfloat16()
    packed = pack_bf16(weight)
    for m in (1, 2, 3, 4, 5, 20):
        x = random_x(m, 160, m)
        got = quant_linear(x, packed)
        wanted = x.double() @ weight.double().T
        bound = wanted.abs() * 2**-8 + x.double().abs() @ weight.double().abs().T * 2**-23 * 168
        assert ((got.double() - wanted).abs() <= bound).all()


def test_they_are_operators_that_torch_can_trace() -> None:
    packed = pack(random_weight(FORMS["Q4_1"], 48, 64, 0), random_weight(FORMS["Q8_0"], 5, 64, 0))
    x = random_x(1, 64, 0)
    tests = ("test_schema", "test_faketensor")
    arguments = (x, packed.data, packed.numbers, torch.randn(53).bfloat16())
    torch.library.opcheck(OPS.quant_linear.default, arguments, test_utils=tests)


def test_one_graph_for_any_number_of_tokens() -> None:
    packed, bias = pack(random_weight(FOUR, 48, 64, 0)), torch.randn(48).bfloat16()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(quant_linear, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (2, 3, 4, 5, 16, 33, 200):
        x = torch.randn(1, tokens, 64).bfloat16()
        torch._dynamo.mark_dynamic(x, 1, min=2, max=4096)
        assert torch.equal(compiled(x, packed, bias), quant_linear(x, packed, bias))
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["int8", "Q6_K", "NVFP4"])
def test_other_dtypes_take_the_reference(form: str) -> None:
    weight = random_weight(FORMS[form], 40, 64, 2)
    for kind in (torch.float32, torch.float64, torch.float16):
        x, packed = (torch.randn(3, 64) / 64).to(kind), pack(weight)
        assert torch.equal(quant_linear(x, packed), quant_linear_reference(x, packed))
        wanted = (x.double() @ weight.dequantize(torch.float64).T).to(kind)
        torch.testing.assert_close(quant_linear(x, packed), wanted)


@pytest.mark.parametrize(("k", "group"), [(48, 48), (96, 48), (40, 8)])
def test_what_cannot_be_laid_out_is_refused(k: int, group: int) -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        pack(random_weight(Scheme(4, group), 32, k, 0))


X, GOOD = torch.zeros(1, 64).bfloat16(), pack(random_weight(FORMS["Q4_1"], 40, 64, 0))
LARGE = pack(random_weight(Scheme(4, 64), 40, 128, 0))


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (X.float(), {}, "takes bfloat16"),
        (X[:, :32], {}, "does not fit"),
        (torch.zeros(()).bfloat16(), {}, "does not fit"),
        (X, {"codes": 12}, "no codes 12"),
        (X, {"codes": -1}, "no codes -1"),
        (X, {"codes": 1}, "needs .* bytes"),
        (X, {"codes": 7}, "the parts have .* bytes"),
        (X, {"codes": 0}, "have no scales"),
        (X, {"group_kind": 0, "group_size": 0}, "need scales"),
        (X, {"group_kind": 8}, "no kind of factors 8"),
        (X, {"num_rows": 65}, "needs .* bytes"),
        (X, {"num_rows": 32}, "the parts have .* bytes"),
        (X, {"num_rows": -1}, r"a weight of \[-1"),
        (X, {"k": 80}, "not whole groups"),
        (X, {"group_size": 0}, "groups of 0"),
        (X, {"group_size": -32}, "groups of -32"),
        (X, {"group_size": 64}, "groups of 64"),
        (X, {"group_size": 16}, "needs .* bytes"),
        (X, {"super_kind": 3, "super_size": 64}, "must be float16 or float32"),
        (X, {"super_kind": 1, "super_size": -32}, "super-groups of -32"),
        (X, {"super_kind": 1, "super_size": 48}, "super-groups of 48"),
        (X, {"super_kind": 1, "super_size": 256, "super_skip": 256}, "super-groups of 256"),
    ],
)
def test_what_does_not_go_together_is_refused(
    x: torch.Tensor, change: dict[str, int], message: str
) -> None:
    packed = GOOD._replace(parts=(GOOD.parts[0]._replace(**change),))
    with pytest.raises(RuntimeError, match=message):
        OPS.quant_linear(x, packed.data, packed.numbers, None)


def test_bytes_that_are_no_weight_are_refused() -> None:
    for data, message in (
        (GOOD.data.view(torch.int8), "must be uint8"),
        (GOOD.data[::2], "contiguous"),
        (GOOD.data[:-64], "needs .* bytes"),
        (torch.cat((GOOD.data, GOOD.data)), "the parts have"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.quant_linear(X, data, GOOD.numbers, None)
    for numbers in ([], GOOD.numbers[:-1]):
        with pytest.raises(RuntimeError, match="a part has 9 numbers"):
            OPS.quant_linear(X, GOOD.data, numbers, None)
    both = Packed(torch.cat((GOOD.data, LARGE.data)), (*GOOD.parts, *LARGE.parts))
    with pytest.raises(RuntimeError, match="parts of 64 and 128 columns"):
        OPS.quant_linear(X, both.data, both.numbers, None)


@pytest.mark.parametrize("bias", [torch.zeros(40), torch.zeros(39).bfloat16()])
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="the bias must be bfloat16"):
        OPS.quant_linear(X, GOOD.data, GOOD.numbers, bias)


def test_nothing_times_something() -> None:
    assert quant_linear(torch.zeros(0, 64).bfloat16(), GOOD).shape == (0, 40)


@pytest.mark.skipif("amx" not in SETS, reason="no matrix units for int8")
def test_rounded_activations_of_a_prompt() -> None:
    """The result is the matmul of the rounded x, whose sums are exact, not that of x."""
    OPS.use_instruction_set("amx")
    for m, n, k in ((33, 96, 64), (50, 40, 1056), (529, 33, 2080)):
        weight, x = random_weight(FORMS["int8"], n, k, 3), random_x(m, k, 3)
        packed = pack(weight)
        step = x.float().abs().amax(1, keepdim=True) / 127
        steps = (x.float() * (1 / step)).round()
        exact = steps.double() @ weight.data.double().T
        wanted = (exact * step.double() * weight.scale.double().T).to(torch.bfloat16)
        found = quant_linear(x, packed, None, round_x=True)
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
        assert not torch.equal(found, quant_linear(x, packed))
        # A few rows are left as they are.
        assert torch.equal(quant_linear(x[:32], packed, None, True), quant_linear(x[:32], packed))
