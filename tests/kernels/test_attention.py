"""Attention over the tokens in use, on every instruction set that runs here, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import (
    KVCache,
    Places,
    Rule,
    attend,
    attend_reference,
    can_attend,
    new_cache,
    write_kv,
)
from kernels.load import load_kernels
from kernels.rotary import Angles
from models.attention import CachedAttention, Step
from tests.kernels.samples import numbers
from tests.kernels.sets import EACH, SETS
from tp.heads import split_heads

assert load_kernels()
pytestmark = pytest.mark.usefixtures("one_thread")
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
PAIRS = [(q, q) for q in (BF16, FP16, FP32)] + [
    (q, cache) for q in (BF16, FP16, FP32) for cache in (FP16, INT8) if q != cache
]
# Of results and weights that are rounded to q's dtype, the sum of weights being 1 and values about 1.
TOLERANCE = {FP32: 1e-5, FP16: 2**-9, BF16: 2**-6}


def token_by_token(q: torch.Tensor, cache: KVCache, at: Places, rule: Rule) -> torch.Tensor:
    """And head by head, in float64."""
    (rows, positions, sources), (runs, scale, cap, window) = at, rule
    k, v = numbers(cache.k, cache.k_scale), numbers(cache.v, cache.v_scale)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for token in range(q.shape[0]):
        position = int(positions[token])
        seen = torch.arange(max(0, position + 1 - window) if window else 0, position + 1)
        if sources is not None:
            row = sources[token, seen].long()
        else:
            assert rows is not None
            row = rows[token].expand(seen.shape)
        for q_start, q_stop, kv_start, kv_stop in runs:
            group = (q_stop - q_start) // (kv_stop - kv_start)
            for head in range(q_start, q_stop):
                kv = kv_start + (head - q_start) // group
                scores = k[row, kv, seen] @ q[token, head].double() * scale
                scores = cap * torch.tanh(scores / cap) if cap else scores
                out[token, head] = scores.softmax(0) @ v[row, kv, seen]
    return out


def full_cache(
    num_rows: int, num_kv: int, cache_len: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> KVCache:
    """Written through `write`, as it is in use; in float32, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    cache = new_cache(num_rows, num_kv, cache_len, head_dim, dtype, "cpu")
    k, v = torch.randn(2, num_rows * cache_len, num_kv, head_dim, generator=generator)
    rows = torch.arange(num_rows).repeat_interleave(cache_len)
    write_kv(cache, k, v, rows, torch.arange(cache_len).repeat(num_rows))
    return cache


def tokens_of(segments: list[tuple[int, int, int]]) -> Places:
    """(row, first position, count) each -> rows and positions."""
    rows = [torch.full((count,), row) for row, _, count in segments]
    positions = [torch.arange(first, first + count) for _, first, count in segments]
    return Places(torch.cat(rows), torch.cat(positions))


@pytest.mark.parametrize("name", EACH)
@settings(max_examples=60, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    world=st.integers(1, 4),
    head_dim=st.sampled_from([2, 10, 16, 64, 80]),
    shape=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 1, 2, 5, 17, 40])), max_size=4),
    cap=st.sampled_from([0.0, 2.0]),
    window=st.sampled_from([0, 0, 1, 7, 140]),
    dtypes=st.sampled_from(PAIRS),
    sourced=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_heads_tokens_and_dtypes(
    name: str,
    heads: tuple[int, int],
    world: int,
    head_dim: int,
    shape: list[tuple[int, int]],
    cap: float,
    window: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    sourced: bool,
    seed: int,
) -> None:
    torch.ops.yoke_kernels.use_instruction_set(name)
    num_heads, num_kv = heads[0] * heads[1], heads[0]
    world = min(world, num_heads)
    generator = torch.Generator().manual_seed(seed)
    cache_len = 50 + 260 * (seed % 2)  # in one block of keys, and in two
    segments = [(0, 3, 1)]
    for row, count in shape:
        first = int(torch.randint(0, cache_len + 1 - count, (), generator=generator))
        segments.append((row, first, count))
    at = tokens_of(segments)
    if sourced:
        size = (len(at.positions), cache_len)
        at = at._replace(sources=torch.randint(0, 3, size, generator=generator, dtype=torch.int32))
    rank = seed % world
    part = split_heads(num_heads, num_kv, rank, world)
    runs = [(run.q_start, run.q_stop, run.kv_start, run.kv_stop) for run in part.runs]
    q = torch.randn(len(at.positions), part.num_q, head_dim, generator=generator).to(dtypes[0])
    cache = full_cache(3, part.num_kv, cache_len, head_dim, dtypes[1], seed)
    rule = Rule(runs, 0.3, cap, window)
    got = attend(q, cache, at, rule)
    assert got.dtype == q.dtype
    tolerance = TOLERANCE[dtypes[0]]
    wanted = token_by_token(q, cache, at, rule)
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtypes", PAIRS)
def test_a_prompts_chunk_over_many_blocks(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """More tokens and keys than a block of either has, in all."""
    cache = full_cache(2, 2, 400, 32, dtypes[1])
    at = tokens_of([(1, 90, 300), (0, 7, 2)])
    q = torch.randn(302, 6, 32).to(dtypes[0])
    for window in (0, 150):
        rule = Rule([(0, 6, 0, 2)], 0.2, window=window)
        own = KVCache(numbers(cache.k, cache.k_scale), numbers(cache.v, cache.v_scale), None, None)
        wanted = attend_reference(q.double(), own, at, rule)
        tolerance = TOLERANCE[dtypes[0]]
        got = attend(q, cache, at, rule).double()
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("name", EACH)
def test_a_row_does_not_depend_on_the_others(
    name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Bit by bit: alone, among others, and wherever among them."""
    torch.ops.yoke_kernels.use_instruction_set(name)
    cache = full_cache(4, 2, 200, 16, dtypes[1])
    rule = Rule([(0, 6, 0, 2)], 0.3, window=100)
    segments = [(0, 13, 1), (1, 0, 150), (2, 190, 1), (3, 120, 5)]
    parts = [torch.randn(count, 6, 16).to(dtypes[0]) for _, _, count in segments]
    alone = [
        attend(q, cache, tokens_of([segment]), rule) for q, segment in zip(parts, segments, strict=True)
    ]
    for order in ([0, 1, 2, 3], [3, 2, 0], [1, 3]):
        q = torch.cat([parts[i] for i in order])
        got = attend(q, cache, tokens_of([segments[i] for i in order]), rule)
        assert torch.equal(got, torch.cat([alone[i] for i in order]))
    # Of a chunk, what comes after a token.
    less = attend(parts[1][:77], cache, tokens_of([(1, 0, 77)]), rule)
    assert torch.equal(less, alone[1][:77])


@pytest.mark.parametrize("dtypes", PAIRS)
def test_a_few_tokens_have_the_bits_of_single_ones(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """So draft tokens are compared with what a step without them would have computed."""
    cache = full_cache(2, 2, 300, 32, dtypes[1])
    rule = Rule([(0, 6, 0, 2)], 0.2)
    for count in (2, 5, 16):
        at = tokens_of([(1, 270, count)])
        q = torch.randn(count, 6, 32).to(dtypes[0])
        one_by_one = [
            attend(q[i : i + 1], cache, tokens_of([(1, 270 + i, 1)]), rule) for i in range(count)
        ]
        assert torch.equal(attend(q, cache, at, rule), torch.cat(one_by_one))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    cache = full_cache(2, 3, 300, 32, BF16)
    at = tokens_of([(0, 0, 250), (1, 3, 30), (1, 299, 1)])
    q = torch.randn(281, 9, 32, generator=torch.Generator().manual_seed(1)).to(BF16)
    call = (q, cache, at, Rule([(0, 9, 0, 3)], 0.3))
    alone = attend(*call)
    torch.set_num_threads(threads)
    assert torch.equal(attend(*call), alone)


def test_scores_far_apart_and_very_large() -> None:
    for name in SETS:
        torch.ops.yoke_kernels.use_instruction_set(name)
        cache = new_cache(1, 1, 4, 2, FP32, "cpu")
        cache.k[0, 0, :, 0] = torch.tensor([0.0, 1000.0, -1e30, 999.0])
        cache.v.copy_(torch.arange(8.0).view(1, 1, 4, 2))
        for positions in (torch.tensor([3]), torch.tensor([2, 3])):
            q = torch.tensor([[[1.0, 0.0]]]).expand(len(positions), 1, 2)
            at = Places(torch.zeros_like(positions), positions)
            call = (q, cache, at, Rule([(0, 1, 0, 1)], 1.0))
            got, wanted = attend(*call), token_by_token(*call)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cache_dtype", [FP32, FP16, INT8])
@pytest.mark.parametrize("kind", ["decode", "rows", "one row", "sources"])
@pytest.mark.parametrize(("cap", "window"), [(0.0, 0), (3.0, 5)])
def test_the_reference_is_the_same(
    kind: str, cache_dtype: torch.dtype, cap: float, window: int
) -> None:
    cache = full_cache(1 if kind == "one row" else 3, 2, 24, 16, cache_dtype)
    positions = torch.tensor([20, 4, 23])
    rows = {"decode": None, "one row": torch.zeros(3, dtype=torch.int64)}.get(
        kind, torch.tensor([2, 0, 1])
    )
    sources = torch.randint(0, 3, (3, 24), dtype=torch.int32) if kind == "sources" else None
    at, rule = Places(rows, positions, sources), Rule([(0, 4, 0, 2)], 0.3, cap, window)
    call = (torch.randn(3, 4, 16), cache, at, rule)
    torch.testing.assert_close(attend_reference(*call), attend(*call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cap", "window"), [(0.0, 0), (3.0, 0), (0.0, 5)])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("length", [1, 3])
def test_the_layer_makes_the_same_with_torchs_attention(
    rank: int, length: int, cap: float, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2's heads on two ranks, of which one group is cut; three tokens of two rows each."""
    part = split_heads(9, 3, rank, 2)
    layer = CachedAttention(part, 16, 0.25, cap, window)
    layer.setup(2, 24, torch.float32)
    layer.k_cache.normal_()
    layer.v_cache.normal_()
    qkv = torch.randn(2 * length, (part.num_q + 2 * part.num_kv) * 16)
    rows = torch.arange(2).repeat_interleave(length)
    positions = torch.tensor([3, 20]).repeat_interleave(length) + torch.arange(length).repeat(2)
    angles = Angles(torch.randn(24, 8), torch.randn(24, 8), False)
    step = Step(Places(rows if length > 1 else None, positions), angles, angles)
    assert can_attend(qkv.device, qkv.dtype)
    own = layer(qkv, angles, step)
    monkeypatch.setattr("kernels.attention.can_attend", lambda device, dtype: False)
    torch.testing.assert_close(own, layer(qkv, angles, step), rtol=1e-5, atol=1e-5)


def test_what_is_not_in_use_is_not_read() -> None:
    """Beyond the last position there may be anything, and before the window."""
    for dtype in (FP32, BF16):
        cache = new_cache(1, 1, 400, 8, dtype, "cpu")
        for part in (cache.k, cache.v):
            part.fill_(float("nan"))
            part[:, :, 200:206] = torch.randn(6, 8)
        for positions in (torch.tensor([205]), torch.arange(202, 206)):
            q = torch.randn(len(positions), 2, 8).to(dtype)
            for name in SETS:
                torch.ops.yoke_kernels.use_instruction_set(name)
                at = Places(torch.zeros_like(positions), positions)
                rule = Rule([(0, 2, 0, 1)], 1.0, window=3)
                assert attend(q, cache, at, rule).isfinite().all()


STRIDED = torch.zeros(2, 2, 16, 8).transpose(2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([8, 0])}, "position 8 in a cache of 8"),
        ({"positions": torch.tensor([-1, 0])}, "position -1"),
        ({"positions": torch.tensor([1])}, "positions must be"),
        ({"rows": torch.tensor([0, 2])}, "row 2 of a cache of 2"),
        ({"rows": torch.tensor([0, -1])}, "row -1"),
        ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, "rows must be"),
        ({"rows": None, "cache": new_cache(3, 2, 8, 16, FP32, "cpu")}, "without rows"),
        ({"q": torch.zeros(2, 4, 8)}, "does not fit caches"),
        ({"q": torch.zeros(2, 4, 16).bfloat16()}, "the caches are Float"),
        ({"runs": [(0, 4, 0, 3)]}, "runs of heads"),
        ({"runs": [(0, 5, 0, 1)]}, "runs of heads"),
        ({"runs": [(0, 3, 0, 1)]}, "runs of heads"),
        ({"cache": KVCache(STRIDED, STRIDED, None, None)}, "contiguous"),
        ({"cache": new_cache(2, 2, 8, 16, INT8, "cpu")._replace(k_scale=None)}, "int8 caches"),
        ({"sources": torch.full((2, 8), 2, dtype=torch.int32)}, "source 2 of a cache of 2"),
        ({"sources": torch.zeros(2, 2, dtype=torch.int32)}, "sources for 2"),
        ({"sources": torch.zeros(2, 8)}, "sources must be int32"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(2, 4, 16),
        "cache": new_cache(2, 2, 8, 16, FP32, "cpu"),
        "rows": torch.tensor([0, 1]),
        "positions": torch.tensor([1, 2]),
        "sources": None,
        "runs": [(0, 4, 0, 2)],
    } | change
    at = Places(given["rows"], given["positions"], given["sources"])
    with pytest.raises(RuntimeError, match=message):
        attend(given["q"], given["cache"], at, Rule(given["runs"], 1.0))
