"""Products with quantized weights: any shape, on every instruction set, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import InputError
from kernels.load import load_kernels
from kernels.quant_linear import Packed, pack, quant_linear, quant_linear_reference, unpack
from tests.kernels.sets import EACH, SETS, parameters
from weights.quant import QuantWeight, pack_nibbles

assert load_kernels()
OPS = torch.ops.yoke_kernels
WITH_TILES = parameters("avx512bf16", "amx")


def random_weight(
    n: int, k: int, bits: int, group: int, offset: bool, half: bool, seed: int
) -> QuantWeight:
    """All whole numbers occur, scales differ by a factor of up to 100."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 8:
        data = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    else:
        data = pack_nibbles(torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8))
    kind = torch.float16 if half else torch.float32
    scale = 10 ** (torch.rand(n, k // group, generator=generator) * 2 - 3)
    added = torch.randn(n, k // group, generator=generator) * scale * 8 if offset else None
    return QuantWeight(data, scale.to(kind), None if added is None else added.to(kind), bits, group)


def random_x(m: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def allowed(x: torch.Tensor, weight: QuantWeight, wanted: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of bfloat16's 8 bits, and what float32 sums may lose in any order:
    each term scale * q * x and offset * x is rounded a few times on its way and once for each sum that
    it is part of, k + 8 at most. Terms are those before scale * q + offset (q from 0 on, for 4 bits)
    cancel."""
    k = x.shape[-1]
    q, scale = weight.integers(), weight.scale.double().repeat_interleave(weight.group_size, 1)
    if weight.bits == 4 and weight.offset is None:
        q = q.to(torch.int8) - 8
    size = q.double().abs() * scale
    if weight.offset is not None:
        size += weight.offset.double().repeat_interleave(weight.group_size, 1).abs()
    return wanted.abs() * 2**-8 + x.double().abs() @ size.T * 2**-23 * (k + 8) + 1e-30


def check(
    x: torch.Tensor, weight: QuantWeight, bias: torch.Tensor | None, name: str = SETS[-1]
) -> None:
    OPS.use_instruction_set(name)
    got = quant_linear(x, pack(weight), bias)
    wanted = x.double() @ weight.dequantize(torch.float64).T
    bound = allowed(x, weight, wanted)
    if weight.offset is not None:  # `dequantize` rounds to float32
        bound = bound + x.double().abs() @ weight.dequantize(torch.float64).abs().T * 2**-22
    is_whole = weight.bits == 8 and weight.group_size == x.shape[-1] and weight.offset is None
    m = x.shape[:-1].numel()
    if weight.bits == 4 and m <= {"avx512bf16": 15, "amx": 4}.get(name, 0):
        # Products of bytes take x to 16 bits of the largest of each 32.
        steps = x.double().abs().unflatten(-1, (-1, 32)).amax(-1)
        of_steps = weight.dequantize(torch.float64).abs().unflatten(1, (-1, 32)).sum(-1)
        bound = bound + steps @ of_steps.T * 2**-15
    if name == "amx" and m > 16 and not is_whole:
        # Matrix units take weights that are rounded to bfloat16, where rows are many.
        bound = bound + x.double().abs() @ weight.dequantize(torch.float64).abs().T * 2**-9
    if bias is not None:
        wanted += bias.double()
        bound = bound + bias.double().abs() * 2**-8
    assert got.dtype == torch.bfloat16 and got.shape == (*x.shape[:-1], weight.shape[0])
    assert ((got.double() - wanted).abs() <= bound).all()


shapes = {
    "n": st.integers(1, 150),
    "steps": st.integers(1, 12),
    "bits": st.sampled_from([4, 8]),
    "offset": st.booleans(),
    "half": st.booleans(),
    "seed": st.integers(0, 99),
}


def group_of(steps: int, seed: int) -> int:
    """One that divides `steps` steps of 32."""
    fitting = [size for size in range(1, steps + 1) if steps % size == 0]
    return 32 * fitting[seed % len(fitting)]


@pytest.mark.parametrize("name", EACH)
@settings(max_examples=25, deadline=None)
@given(m=st.sampled_from([1, 2, 3, 4, 5, 17, 64]), with_bias=st.booleans(), **shapes)
def test_any_shape(
    name: str,
    m: int,
    n: int,
    steps: int,
    bits: int,
    offset: bool,
    half: bool,
    with_bias: bool,
    seed: int,
) -> None:
    weight = random_weight(n, 32 * steps, bits, group_of(steps, seed), offset, half, seed)
    bias = torch.randn(n).bfloat16() if with_bias else None
    check(random_x(m, 32 * steps, seed), weight, bias, name)


# Past the sizes at which the way changes: 15 rows, 120 and 512 rows at a time, 256 numbers of k at a
# time, four panels, sums of 4 MiB; and at each with remainders.
@pytest.mark.parametrize("name", SETS[-2:])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(15, 129, 288), (16, 95, 544), (125, 40, 512), (241, 33, 320), (520, 2090, 64)]
)
@pytest.mark.parametrize(("bits", "offset"), [(4, False), (4, True), (8, False)])
def test_at_the_borders(name: str, m: int, n: int, k: int, bits: int, offset: bool) -> None:
    for group in (32, k):
        weight = random_weight(n, k, bits, group, offset, True, m)
        check(random_x(m, k, m), weight, torch.randn(n).bfloat16(), name)


@settings(max_examples=25, deadline=None)
@given(**shapes)
def test_what_is_packed_can_be_unpacked(
    n: int, steps: int, bits: int, offset: bool, half: bool, seed: int
) -> None:
    weight = random_weight(n, 32 * steps, bits, group_of(steps, seed), offset, half, seed)
    again = unpack(pack(weight))
    assert torch.equal(again.data, weight.data) and torch.equal(again.scale, weight.scale)
    assert (again.bits, again.group_size) == (weight.bits, weight.group_size)
    assert (again.offset is None) == (weight.offset is None)
    if weight.offset is not None and again.offset is not None:
        assert torch.equal(again.offset, weight.offset)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_is_the_one_that_is_drawn(bits: int) -> None:
    weight = random_weight(70, 96, bits, 32, True, True, 0)
    packed, q = pack(weight), weight.integers()
    assert packed.scale is not None
    for n, k in ((0, 0), (15, 31), (16, 33), (37, 64), (69, 95), (50, 43)):
        panel, tile, row = n // 32, n // 16 % 2, n % 16
        step, pair, odd = k // 32, k % 32 // 2, k % 2
        part = packed.data[panel, step, tile]
        if bits == 8:
            found = part.view(16, 16, 2)[pair, row, odd].view(torch.int8)
        else:
            word = int(part.view(torch.int32).view(4, 16)[pair // 4, row])
            found = torch.tensor(word >> (pair % 4 * 4 + 16 * odd) & 15)
        assert int(found) == int(q[n, k])
        assert packed.scale[panel, k // 32, tile, row] == weight.scale[n, k // 32]
    assert not packed.scale.permute(0, 2, 3, 1).flatten(0, 2)[70:].any()


def test_cut_weights_are_packed_like_whole_ones() -> None:
    weight = random_weight(100, 256, 4, 128, True, True, 3)
    for part in (weight.rows(17, 80), weight.columns(64, 224), weight.rows(5, 99).columns(128, 256)):
        check(random_x(3, part.shape[1], 3), part, None)


def test_an_offset_that_no_half_holds() -> None:
    weight = random_weight(40, 64, 4, 32, True, True, 5)
    assert weight.offset is not None
    mixed = QuantWeight(weight.data, weight.scale, weight.offset.float() * 1e6, 4, 32)
    scale = pack(mixed).scale
    assert scale is not None and scale.dtype == torch.float32
    check(random_x(2, 64, 5), mixed, None)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_the_same_whatever_the_others_are(name: str, bits: int) -> None:
    """Bit for bit among numbers of rows that go the same way."""
    OPS.use_instruction_set(name)
    packed, x = pack(random_weight(70, 320, bits, 64, True, True, 1)), random_x(131, 320, 1)
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
    weight, x = random_weight(50, 160, 4, 32, False, True, 2), random_x(m, 160, 2)
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
    weight, x = random_weight(50, 160, 4, 32, True, True, 3), random_x(3, 160, 3)
    x[1] = 0
    x[2] *= 1e-36
    got = quant_linear(x, pack(weight))
    assert (got[1] == 0).all() and (got[2].abs() < 1e-30).all() and got[0].abs().min() > 0


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("rows", [2, 40])
def test_many_threads_make_the_same(name: str, rows: int) -> None:
    OPS.use_instruction_set(name)
    x, packed = random_x(rows, 640, 0), pack(random_weight(1003, 640, 4, 32, False, True, 0))
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
@settings(max_examples=25, deadline=None)
@given(**shapes)
def test_tiles_are_the_weights_rounded(
    name: str, n: int, steps: int, bits: int, offset: bool, half: bool, seed: int
) -> None:
    """Within a unit of bfloat16 of the exact ones (float32 in between), whole numbers exactly."""
    OPS.use_instruction_set(name)
    k, group = 32 * steps, group_of(steps, seed)
    weight = random_weight(n, k, bits, group, offset, half, seed)
    tiles = OPS.quant_tiles(*pack(weight))
    got = tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, k)[:n].double()
    if bits == 8 and group == k and not offset:
        assert torch.equal(got, weight.data.double())
        return
    wanted = weight.dequantize(torch.float64)
    lost = weight.scale.abs().double() * 255 + (0 if weight.offset is None else weight.offset.abs())
    lost = lost.double().repeat_interleave(group, 1) * 2**-22
    assert ((got - wanted).abs() <= wanted.abs() * 2**-8 + lost).all()


@pytest.mark.parametrize("name", EACH)
def test_bfloat16_in_the_same_layout(name: str) -> None:
    OPS.use_instruction_set(name)
    weight = torch.randn(90, 160).bfloat16()
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 6)).view(3, 2, 16, 5, 16, 2)
    data = padded.permute(0, 3, 1, 4, 2, 5).contiguous().view(torch.uint8).reshape(3, 5, 2, 1024)
    for m in (1, 2, 3, 4, 5, 20):
        x = random_x(m, 160, m)
        got = OPS.quant_linear(x, data, None, None, 16, 0, 90, None)
        wanted = x.double() @ weight.double().T
        bound = wanted.abs() * 2**-8 + x.double().abs() @ weight.double().abs().T * 2**-23 * 168
        assert ((got.double() - wanted).abs() <= bound).all()


def test_it_is_an_operator_that_torch_can_trace() -> None:
    packed = pack(random_weight(48, 64, 4, 32, True, True, 0))
    x = random_x(1, 64, 0)
    tests = ("test_schema", "test_faketensor")
    arguments = (x, *packed, torch.randn(48).bfloat16())
    torch.library.opcheck(OPS.quant_linear.default, arguments, test_utils=tests)


def test_one_graph_for_any_number_of_tokens() -> None:
    packed, bias = pack(random_weight(48, 64, 4, 32, False, True, 0)), torch.randn(48).bfloat16()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(quant_linear, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (2, 3, 4, 5, 16, 33, 200):
        x = torch.randn(1, tokens, 64).bfloat16()
        torch._dynamo.mark_dynamic(x, 1, min=2, max=4096)
        assert torch.equal(compiled(x, packed, bias), quant_linear(x, packed, bias))
    assert counter.frame_count == 1


def test_other_dtypes_take_the_reference() -> None:
    weight = random_weight(40, 64, 8, 64, False, False, 2)
    for kind in (torch.float32, torch.float64, torch.float16):
        x, packed = torch.randn(3, 64).to(kind), pack(weight)
        assert torch.equal(quant_linear(x, packed), quant_linear_reference(x, packed))
        wanted = (x.double() @ weight.dequantize(torch.float64).T).to(kind)
        torch.testing.assert_close(quant_linear(x, packed), wanted)


@pytest.mark.parametrize(("k", "group"), [(48, 48), (96, 48), (64, 16)])
def test_what_cannot_be_laid_out_is_refused(k: int, group: int) -> None:
    weight = random_weight(32, k, 4, group, False, True, 0)
    with pytest.raises(InputError, match="multiples of 32"):
        pack(weight)


X, GOOD = torch.zeros(1, 64).bfloat16(), pack(random_weight(40, 64, 4, 32, True, True, 0))
assert GOOD.scale is not None


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (X.float(), {}, "takes bfloat16"),
        (X[:, :32], {}, "does not fit"),
        (torch.zeros(()).bfloat16(), {}, "does not fit"),
        (X, {"bits": 5}, "4, 8 or 16 bits"),
        (X, {"bits": 8}, "must be uint8 and contiguous"),
        (X, {"scale": None, "offset": None}, "4 or 8 bits have scales"),
        (X, {"bits": 16, "data": torch.zeros(2, 2, 2, 1024).byte()}, "and no others"),
        (X, {"data": GOOD.data.view(torch.int8)}, "must be uint8"),
        (X, {"data": GOOD.data[0]}, "must be uint8"),
        (X, {"data": GOOD.data.transpose(0, 1)}, "contiguous"),
        (X, {"num_rows": 65}, "65 rows"),
        (X, {"num_rows": 32}, "32 rows"),
        (X, {"num_rows": -1}, "-1 rows"),
        (X, {"group_size": 16}, "groups of 16"),
        (X, {"group_size": 0}, "groups of 0"),
        (X, {"group_size": -32}, "groups of -32"),
        (X, {"group_size": 128}, "groups of 128"),
        (X, {"group_size": 64}, "contiguous"),
        (X, {"scale": GOOD.scale.bfloat16()}, "all float16 or all float32"),
        (X, {"scale": GOOD.scale.float()}, "all float16 or all float32"),
        (X, {"scale": GOOD.scale[:1]}, "scales and offsets must be contiguous"),
        (X, {"offset": GOOD.scale[..., :8]}, "scales and offsets must be contiguous"),
    ],
)
def test_what_does_not_go_together_is_refused(
    x: torch.Tensor, change: dict[str, Any], message: str
) -> None:
    packed: Packed = GOOD._replace(**change)
    with pytest.raises(RuntimeError, match=message):
        OPS.quant_linear(x, *packed, None)


@pytest.mark.parametrize("bias", [torch.zeros(40), torch.zeros(39).bfloat16()])
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="the bias must be bfloat16"):
        OPS.quant_linear(X, *GOOD, bias)


def test_nothing_times_something() -> None:
    assert quant_linear(torch.zeros(0, 64).bfloat16(), GOOD).shape == (0, 40)


@pytest.mark.skipif("amx" not in SETS, reason="no matrix units for int8")
def test_rounded_activations_of_a_prompt() -> None:
    """The result is the matmul of the rounded x, whose sums are exact, not that of x."""
    OPS.use_instruction_set("amx")
    for m, n, k in ((33, 96, 64), (50, 40, 1056), (529, 33, 2080)):
        weight, x = random_weight(n, k, 8, k, False, False, 3), random_x(m, k, 3)
        packed = pack(weight)
        step = x.float().abs().amax(1, keepdim=True) / 127
        steps = (x.float() * (1 / step)).round()
        exact = steps.double() @ weight.integers().double().T
        wanted = (exact * step.double() * weight.scale.double().T).to(torch.bfloat16)
        found = quant_linear(x, packed, None, round_x=True)
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
        assert not torch.equal(found, quant_linear(x, packed))
        # A few rows are left as they are.
        assert torch.equal(quant_linear(x[:32], packed, None, True), quant_linear(x[:32], packed))
