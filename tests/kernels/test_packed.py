"""bfloat16 weights in the packed layout: laid out, multiplied and looked up as plain ones are."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.load import load_kernels
from kernels.packed import (
    PackedRows,
    clear_rows,
    new_packed,
    pack_bf16,
    pack_reference,
    packed_rows,
    prefers_packed,
)
from kernels.quant_linear import Part, dequantize, quant_linear, quant_linear_reference
from tests.kernels.samples import random
from tests.kernels.sets import EACH, SETS

assert load_kernels()
OPS = torch.ops.yoke_kernels


def check(m: int, n: int, k: int, with_bias: bool, seed: int) -> None:
    """Against float64: rounding to bfloat16, and what float32 sums may lose in any order."""
    x, weight, bias = random(m, k, seed=seed), random(n, k, seed=seed + 1), random(n, seed=seed + 2)
    got = quant_linear(x, pack_bf16(weight), bias if with_bias else None)
    wanted = x.double() @ weight.double().T
    bound = wanted.abs() * 2**-8 + x.double().abs() @ weight.double().abs().T * 2**-23 * (k + 8) + 1e-30
    if with_bias:
        wanted += bias.double()
        bound += bias.double().abs() * 2**-8
    assert got.shape == (m, n) and got.dtype == torch.bfloat16
    assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("name", EACH)
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 150),
    k=st.integers(1, 400),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matmuls_of_any_shape(name: str, m: int, n: int, k: int, with_bias: bool, seed: int) -> None:
    OPS.use_instruction_set(name)
    check(m, n, k, with_bias, seed)


# Beyond the sizes at which the algorithm changes: 16, 32, 64 and 512 rows, 512 numbers of k, panels
# that are read alternately, sums of 4 MiB; and each with remainders.
@pytest.mark.parametrize("name", SETS[-2:])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 300, 544),
        (5, 160, 96),
        (16, 129, 1041),
        (32, 96, 512),
        (33, 97, 513),
        (64, 130, 600),
        (65, 70, 600),
        (100, 33, 1030),
        (530, 2120, 545),
    ],
)
def test_matmuls_at_the_borders(name: str, m: int, n: int, k: int) -> None:
    OPS.use_instruction_set(name)
    check(m, n, k, True, m)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("k", [320, 331])
def test_a_row_is_the_same_whatever_the_others_are(name: str, k: int) -> None:
    """Bit for bit, among few rows and among many."""
    OPS.use_instruction_set(name)
    packed, x, bias = pack_bf16(random(170, k, seed=1)), random(600, k, seed=2), random(170, seed=3)
    most = 4 if name == "amx" else 15
    few, many = quant_linear(x[:most], packed, bias), quant_linear(x, packed, bias)
    for end in range(1, most + 1):
        assert torch.equal(quant_linear(x[end // 2 : end], packed, bias), few[end // 2 : end])
    for start, end in ((0, most + 1), (13, 29), (20, 53), (50, 120), (7, 590)):
        assert torch.equal(quant_linear(x[start:end], packed, bias), many[start:end])


@pytest.mark.parametrize("name", SETS[-2:])
@pytest.mark.parametrize("rows", [1, 7, 30, 90])
def test_many_threads_make_the_same(name: str, rows: int) -> None:
    OPS.use_instruction_set(name)
    x, packed = random(rows, 640, seed=0), pack_bf16(random(1003, 640, seed=1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quant_linear(x, packed)
        torch.set_num_threads(3)
        three = quant_linear(x, packed)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(three, one)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 150), k=st.integers(1, 200), data=st.data())
def test_parts_are_packed_as_the_whole_is(n: int, k: int, data: st.DataObject) -> None:
    """Any borders, any strides; float32 is rounded as torch rounds it."""
    weight = torch.randn(k, n).T
    rounded = weight.bfloat16()
    whole = pack_bf16(rounded)
    assert torch.equal(whole.data, pack_reference(rounded))
    assert torch.equal(dequantize(whole, torch.bfloat16), rounded)
    first, second = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    used = data.draw(st.integers(second, n))
    parts = new_packed(n, k)
    parts.data.fill_(255)
    clear_rows(parts.data, used)
    for start, stop in ((second, used), (0, first), (first, second)):
        PackedRows(parts.data, start, stop - start).fill(weight[start:stop])
    rounded[used:] = 0
    assert torch.equal(parts.data, pack_reference(rounded))


def test_large_parts_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.packed.PIECE_BYTES", 4096)
    weight = torch.randn(200, 100)
    packed = new_packed(203, 100)
    clear_rows(packed.data, 203)
    PackedRows(packed.data, 3, 200).fill(weight)
    assert torch.equal(dequantize(packed, torch.bfloat16)[3:], weight.bfloat16())


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 100), k=st.integers(1, 100), start=st.integers(0, 50), seed=st.integers(0, 99))
def test_rows_are_those_of_the_table(n: int, k: int, start: int, seed: int) -> None:
    table = random(n, k, seed=seed)
    tokens = torch.randint(0, start + n + 20, (3, 17), generator=torch.Generator().manual_seed(seed))
    got = packed_rows(tokens, pack_bf16(table), start, n)
    local = tokens - start
    mine = (local >= 0) & (local < n)
    wanted = torch.where(mine.unsqueeze(-1), table[local.clamp(0, n - 1)], 0)
    assert torch.equal(got, wanted)


def test_they_are_operators_that_torch_can_trace() -> None:
    weight = random(48, 70, seed=0)
    packed, tokens = pack_bf16(weight), torch.tensor([[3, 50], [0, 47]])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.pack_rows.default, (packed.data, weight[:5], 7), test_utils=tests)
    arguments = (tokens, packed.data, packed.numbers, 0, 48)
    torch.library.opcheck(OPS.packed_rows.default, arguments, test_utils=tests)


def test_one_graph_for_any_number_of_tokens() -> None:
    packed, bias = pack_bf16(random(48, 64, seed=0)), random(48, seed=1)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        return quant_linear(packed_rows(tokens, packed, 0, 48), packed, bias)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for count in (2, 3, 5, 16, 33, 200):
        tokens = torch.arange(count) % 48
        torch._dynamo.mark_dynamic(tokens, 0, min=2, max=4096)
        assert torch.equal(compiled(tokens), step(tokens))
    assert counter.frame_count == 1


def test_other_dtypes_take_the_reference() -> None:
    weight, x = random(40, 70, seed=2), torch.randn(3, 70)
    packed = pack_bf16(weight)
    assert torch.equal(quant_linear(x, packed), quant_linear_reference(x, packed))
    torch.testing.assert_close(quant_linear(x, packed), x @ weight.float().T)


def test_it_is_preferred_where_there_are_tiles() -> None:
    for name in SETS:
        OPS.use_instruction_set(name)
        assert prefers_packed() == (name == "amx")


GOOD = pack_bf16(random(40, 70, seed=0)).data
TOKENS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("data", "weight", "first", "message"),
    [
        (GOOD, torch.zeros(2, 70), 0, "takes 2-D bfloat16"),
        (GOOD, random(2, 64, seed=0), 0, "do not fit into"),
        (GOOD, random(2, 97, seed=0), 0, "do not fit into"),
        (GOOD, random(2, 70, seed=0), 63, "do not fit into"),
        (GOOD, random(2, 70, seed=0), -1, "do not fit into"),
        (GOOD[..., :512], random(2, 70, seed=0), 0, "must be uint8 and contiguous"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    data: torch.Tensor, weight: torch.Tensor, first: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.pack_rows(data, weight, first)


@pytest.mark.parametrize(
    ("tokens", "k", "count", "message"),
    [
        (TOKENS.int(), 70, 40, "must be int64"),
        (TOKENS, 97, 40, "bytes"),
        (TOKENS, 64, 40, "bytes"),
        (TOKENS, 70, 65, "65 rows of a table of 40"),
        (TOKENS, 70, -1, "-1 rows"),
    ],
)
def test_what_cannot_be_looked_up_is_refused(
    tokens: torch.Tensor, k: int, count: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.packed_rows(tokens, GOOD, list(Part(0, 40, k)), 0, count)


@pytest.mark.parametrize("k", [64, 97])
def test_matmuls_that_do_not_fit_are_refused(k: int) -> None:
    with pytest.raises(RuntimeError, match="does not fit"):
        OPS.quant_linear(random(1, k, seed=0), GOOD, list(Part(0, 40, 70)), None)
