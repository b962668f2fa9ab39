"""Matmuls with any number of rows, on every instruction set that runs here, against float64."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.linear import linear
from kernels.load import has_kernels, load_kernels
from tests.kernels.sets import EACH, SETS

assert load_kernels()


def test_whether_there_are_kernels_is_a_constant_of_compiled_code() -> None:
    """Marked without importing the compiler, as torch's own decorator marks it."""
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(marked).items() <= vars(has_kernels).items()
    assert vars(marked)


def bound(x: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of bfloat16's 8 bits, and float32 sums in any order."""
    terms = x.double().abs() @ weight.double().abs().T
    return wanted.abs() * 2**-8 + terms * 2**-23 * (x.shape[-1] + 8) + 1e-30


def check(m: int, n: int, k: int, with_bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).bfloat16()
    weight = torch.randn(n, k, generator=generator).bfloat16()
    bias = torch.randn(n, generator=generator).bfloat16() if with_bias else None
    got = torch.ops.yoke_kernels.linear(x, weight, bias)
    wanted = x.double() @ weight.double().T
    allowed = bound(x, weight, wanted)
    if bias is not None:
        wanted += bias.double()
        allowed += bias.double().abs() * 2**-8
    assert ((got.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("name", EACH)
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(name: str, m: int, n: int, k: int, with_bias: bool, seed: int) -> None:
    torch.ops.yoke_kernels.use_instruction_set(name)
    check(m, n, k, with_bias, seed)


# Beyond the sizes at which the blocked matmul changes its algorithm: 32 and 512 rows, 512 numbers of k,
# x of a MiB, sums of a MiB; and each with remainders.
@pytest.mark.parametrize("name", SETS[-2:])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (33, 96, 512),
        (48, 47, 1041),
        (100, 33, 2050),
        (512, 64, 1024),
        (513, 600, 1100),
        (530, 15, 65),
        (1100, 1040, 1056),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_large_shapes(name: str, m: int, n: int, k: int, with_bias: bool) -> None:
    torch.ops.yoke_kernels.use_instruction_set(name)
    check(m, n, k, with_bias, m)


@pytest.mark.parametrize(("n", "k"), [(64, 1024), (75, 1111), (640, 1600)])
def test_a_row_is_the_same_whatever_the_others_are(n: int, k: int) -> None:
    if torch.ops.yoke_kernels.few_rows() < 600:
        pytest.skip("many rows go to torch's matmul here")
    x, weight, bias = (
        torch.randn(600, k).bfloat16(),
        torch.randn(n, k).bfloat16(),
        torch.randn(n).bfloat16(),
    )
    whole = torch.ops.yoke_kernels.linear(x, weight, bias)
    for start, rows in ((0, 5), (7, 16), (100, 33), (3, 200), (50, 512)):
        part = torch.ops.yoke_kernels.linear(x[start : start + rows], weight, bias)
        assert torch.equal(part, whole[start : start + rows])


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("rows", [2, 90])
def test_many_threads_make_the_same(name: str, rows: int) -> None:
    torch.ops.yoke_kernels.use_instruction_set(name)
    x, weight = torch.randn(rows, 640).bfloat16(), torch.randn(1003, 640).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch.ops.yoke_kernels.linear(x, weight, None)
        torch.set_num_threads(3)
        three = torch.ops.yoke_kernels.linear(x, weight, None)
    finally:
        torch.set_num_threads(threads)
    if rows <= torch.ops.yoke_kernels.few_rows():
        assert torch.equal(three, one)
    else:  # torch's, which does not promise that
        torch.testing.assert_close(three, one)


@pytest.mark.parametrize("name", EACH)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    torch.ops.yoke_kernels.use_instruction_set(name)
    x, weight = torch.randn(7, 96).bfloat16(), torch.randn(40, 96).bfloat16()
    together = torch.ops.yoke_kernels.linear(x, weight, None)
    for row, alone in zip(x, together, strict=True):
        torch.testing.assert_close(
            torch.ops.yoke_kernels.linear(row, weight, None), alone, rtol=2**-7, atol=1e-5
        )


def test_it_is_an_operator_that_torch_can_trace() -> None:
    x, weight, bias = torch.randn(1, 1, 64).bfloat16(), torch.randn(48, 64).bfloat16(), None
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.yoke_kernels.linear.default, (x, weight, bias), test_utils=tests)
    compiled = torch.compile(linear, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x, weight), linear(x, weight))


def test_one_graph_for_any_number_of_tokens() -> None:
    weight, bias = torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (2, 3, 4, 31, 33, 200, 600):
        x = torch.randn(1, tokens, 64).bfloat16()
        torch._dynamo.mark_dynamic(x, 1, min=2, max=4096)
        torch.testing.assert_close(compiled(x, weight, bias), linear(x, weight, bias), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_other_dtypes_are_torchs() -> None:
    x, weight = torch.randn(3, 32), torch.randn(24, 32)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


def test_many_rows_without_matrix_units_are_torchs() -> None:
    torch.ops.yoke_kernels.use_instruction_set("base")
    rows = torch.ops.yoke_kernels.few_rows() + 1
    x, weight = torch.randn(2, rows, 32).bfloat16(), torch.randn(24, 32).bfloat16()
    wanted = torch.nn.functional.linear(x, weight)
    assert torch.equal(linear(x, weight), wanted)


@pytest.mark.parametrize("name", EACH)
def test_the_peak_counts_what_it_does(name: str) -> None:
    torch.ops.yoke_kernels.use_instruction_set(name)
    once = torch.ops.yoke_kernels.peak(10)
    assert once > 0
    assert torch.ops.yoke_kernels.peak(1000) == 100 * once


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 8), torch.zeros(4, 8).bfloat16(), "takes bfloat16"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(4, 9).bfloat16(), "does not fit"),
        (torch.zeros(1, 4).bfloat16(), torch.zeros(4, 9).bfloat16()[:, :4], "must be contiguous"),
    ],
)
def test_what_does_not_go_together_is_refused(
    x: torch.Tensor, weight: torch.Tensor, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.yoke_kernels.linear(x, weight, None)


def test_nothing_times_something_is_zero() -> None:
    x, weight = torch.zeros(2, 0).bfloat16(), torch.zeros(3, 0).bfloat16()
    assert torch.equal(torch.ops.yoke_kernels.linear(x, weight, None), torch.zeros(2, 3).bfloat16())
    bias = torch.randn(3).bfloat16()
    with_bias = torch.ops.yoke_kernels.linear(x, weight, bias)
    assert torch.equal(with_bias, bias.expand(2, 3))
    assert torch.ops.yoke_kernels.linear(
        torch.zeros(0, 4).bfloat16(), torch.zeros(3, 4).bfloat16(), None
    ).shape == (0, 3)
