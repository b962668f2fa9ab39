"""Writing the cache, in place and compiled, and tracing what attends to it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from kernels.attention import (
    KVCache,
    Places,
    Rule,
    attend,
    attend_reference,
    new_cache,
    write_kv,
    write_kv_reference,
)
from kernels.load import load_kernels
from tests.kernels.samples import numbers
from tests.kernels.sets import EACH

assert load_kernels()
pytestmark = pytest.mark.usefixtures("one_thread")
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8


def some_cache(
    num_rows: int, num_kv: int, cache_len: int, head_dim: int, dtype: torch.dtype
) -> KVCache:
    cache = new_cache(num_rows, num_kv, cache_len, head_dim, dtype, "cpu")
    k, v = torch.randn(2, num_rows * cache_len, num_kv, head_dim)
    rows = torch.arange(num_rows).repeat_interleave(cache_len)
    write_kv(cache, k, v, rows, torch.arange(cache_len).repeat(num_rows))
    return cache


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, INT8])
@pytest.mark.parametrize("name", EACH)
def test_write_puts_each_token_in_its_place(name: str, dtype: torch.dtype) -> None:
    torch.ops.yoke_kernels.use_instruction_set(name)
    for source in (FP32, BF16, FP16):
        own, wanted = (new_cache(3, 2, 5, 19, dtype, "cpu") for _ in range(2))
        # Not contiguous, as slices of one projection are; with a zero token, and numbers of all sizes.
        both = (torch.randn(4, 5, 19) * 10.0 ** torch.randint(-7, 4, (4, 5, 1))).to(source)
        both[2] = 0
        k, v = both[:, 1:3], both[:, 3:5]
        rows, positions = torch.tensor([2, 0, 0, 2]), torch.tensor([4, 0, 1, 2])
        write_kv(own, k, v, rows, positions)
        write_kv_reference(wanted, k, v, rows, positions)
        for got, there in zip(own, wanted, strict=True):
            if got is None or there is None:
                assert got is there
            else:
                assert torch.equal(got, there)


@pytest.mark.parametrize("given", [FP32, BF16, FP16])
def test_int8_errs_by_half_a_step(given: torch.dtype) -> None:
    """A step is 1/127 of the largest number of the token's head."""
    cache = new_cache(1, 3, 50, 64, INT8, "cpu")
    k = torch.randn(50, 3, 64).to(given)
    write_kv(cache, k, -k, torch.zeros(50, dtype=torch.int64), torch.arange(50))
    step = k.double().abs().amax(-1, keepdim=True) / 127
    for part, scale, x in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, -k)):
        error = (numbers(part, scale)[0].transpose(0, 1) - x.double()).abs()
        assert (error <= step * 0.5001).all() and part.abs().amax() == 127


@pytest.mark.parametrize("dtype", [FP32, INT8])
def test_the_last_write_wins(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    cache = new_cache(2, 40, 4, 64, dtype, "cpu")
    k = torch.arange(1.0, 301.0).view(-1, 1, 1).expand(300, 40, 64)
    rows, positions = torch.tensor([0, 1] * 150), torch.full((300,), 3)
    write_kv(cache, k, k * 2, rows, positions)
    for row, number in ((0, 299), (1, 300)):
        assert numbers(cache.k, cache.k_scale)[row, :, 3].allclose(torch.tensor(float(number)).double())
        assert numbers(cache.v, cache.v_scale)[row, :, 3].allclose(torch.tensor(2.0 * number).double())
    assert not cache.k[:, :, :3].any()


class Layer(torch.nn.Module):
    """Writes and attends, its cache in buffers, as the models' do."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, part in zip(KVCache._fields, new_cache(2, 2, 600, 16, dtype, "cpu"), strict=True):
            self.register_buffer(name, part)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        cache = KVCache(self.k, self.v, self.k_scale, self.v_scale)
        at, rule = Places(rows, positions), Rule([(0, 4, 0, 2)], 0.3)
        write_kv(cache, k, v, rows, positions)
        first = attend(q, cache, at, rule)
        write_kv(cache, k, first[:, :2], rows, positions)
        return attend(q, cache, at, rule)


def layer_inputs(count: int) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(count, 4, 16), torch.randn(count, 2, 16), torch.randn(count, 2, 16)
    return q, k, v, torch.ones(count, dtype=torch.int64), torch.arange(count)


@pytest.mark.parametrize("dtype", [FP32, INT8])
def test_compiled_it_writes_in_place_and_copies_nothing(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    own, eager = Layer(dtype), Layer(dtype)
    places = {name: buffer.data_ptr() for name, buffer in own.named_buffers()}
    compiled = torch.compile(own, fullgraph=True, dynamic=False)
    inputs = layer_inputs(1)
    with torch.no_grad():
        got, (code,) = run_and_get_code(compiled, *inputs)
        assert torch.equal(got, eager(*inputs))
        inputs = layer_inputs(1)
        assert torch.equal(compiled(*inputs), eager(*inputs))
    for name, buffer in own.named_buffers():
        assert buffer.data_ptr() == places[name] and buffer.any()
        assert torch.equal(buffer, eager.get_buffer(name))
    called = code[code.index("def call(") :]
    assert called.count("yoke_kernels.write_kv.default(") == 2
    assert "clone" not in called and "copy_(" not in called
    assert "empty_strided_cpu((2, 2, 600" not in called and "cpp_fused" not in called


def test_any_number_of_tokens_is_compiled_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    own, eager = Layer(FP32), Layer(FP32)
    compiled = torch.compile(own, backend=counter, fullgraph=True)
    for count in (7, 2, 130, 512):
        inputs = layer_inputs(count)
        for part in inputs:
            torch._dynamo.mark_dynamic(part, 0, min=2, max=512)
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), eager(*inputs))
    assert counter.frame_count == 1
    assert torch.equal(own.k, eager.k)


@pytest.mark.parametrize("kind", ["decode", "rows", "sources"])
def test_the_reference_can_be_traced(kind: str) -> None:
    torch._dynamo.reset()
    cache = some_cache(3, 2, 24, 16, INT8)
    rows = None if kind == "decode" else torch.tensor([2, 0, 1])
    sources = torch.randint(0, 3, (3, 24), dtype=torch.int32) if kind == "sources" else None
    at = Places(rows, torch.tensor([20, 4, 23]), sources)
    call = (torch.randn(3, 4, 16), cache, at, Rule([(0, 4, 0, 2)], 0.3))
    compiled = torch.compile(attend_reference, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*call), attend_reference(*call))


@pytest.mark.parametrize("dtype", [FP32, INT8])
def test_they_are_operators_that_torch_can_trace(dtype: torch.dtype) -> None:
    tests = ("test_schema", "test_faketensor")
    cache = some_cache(2, 2, 8, 16, dtype)
    rows, positions = torch.tensor([0, 1]), torch.tensor([3, 7])
    args = (torch.randn(2, 4, 16), *cache, rows, positions, [0, 4, 0, 2], 0.25, 0.0, 0, None)
    torch.library.opcheck(torch.ops.yoke_kernels.attend.default, args, test_utils=tests)
    new = torch.randn(2, 2, 2, 16)
    for where in (rows, None):
        written = (*cache, new[0], new[1], where, positions)
        torch.library.opcheck(torch.ops.yoke_kernels.write_kv.default, written, test_utils=tests)


def test_what_cannot_be_written_is_refused() -> None:
    cache, k = new_cache(2, 2, 8, 16, FP32, "cpu"), torch.zeros(1, 2, 16)
    where = torch.tensor([1])
    for rows, positions, new, message in (
        (torch.tensor([2]), where, k, "row 2"),
        (where, torch.tensor([8]), k, "position 8"),
        (None, where, k, "without rows"),
        (where, where, k[:, :1], "keys or values"),
    ):
        with pytest.raises(RuntimeError, match=message):
            write_kv(cache, new, new, rows, positions)
