"""Attention over the tokens in use, on every instruction set that runs here, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import attend, can_attend, causal_mask
from kernels.load import load_kernels
from models.attention import CachedAttention
from tp.heads import split_heads

assert load_kernels()
SETS = torch.ops.yoke_kernels.instruction_sets()
Runs = list[tuple[int, int, int, int]]


@pytest.fixture(autouse=True)
def best_afterwards() -> Iterator[None]:
    yield
    torch.ops.yoke_kernels.use_instruction_set(SETS[-1])


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    runs: Runs,
    scale: float,
    cap: float,
    window: int,
) -> torch.Tensor:
    """Token by token and head by head, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, step in ((row, step) for row in range(q.shape[0]) for step in range(q.shape[1])):
        position = int(positions[row, step])
        start = max(0, position + 1 - window) if window else 0
        for q_start, q_stop, kv_start, kv_stop in runs:
            group = (q_stop - q_start) // (kv_stop - kv_start)
            for head in range(q_start, q_stop):
                kv = kv_start + (head - q_start) // group
                keys = k[row, kv, start : position + 1].double()
                scores = keys @ q[row, step, head].double() * scale
                scores = cap * torch.tanh(scores / cap) if cap else scores
                out[row, step, head] = scores.softmax(0) @ v[row, kv, start : position + 1].double()
    return out


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=50, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    world=st.integers(1, 4),
    head_dim=st.sampled_from([2, 10, 16, 64, 80]),
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 1, 5]),
    cap=st.sampled_from([0.0, 2.0]),
    window=st.integers(0, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_heads_and_lengths(
    name: str,
    heads: tuple[int, int],
    world: int,
    head_dim: int,
    batch: int,
    length: int,
    cap: float,
    window: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.ops.yoke_kernels.use_instruction_set(name)
    num_heads, num_kv = heads[0] * heads[1], heads[0]
    world = min(world, num_heads)
    generator = torch.Generator().manual_seed(seed)
    for rank in range(world):
        part = split_heads(num_heads, num_kv, rank, world)
        runs = [(run.q_start, run.q_stop, run.kv_start, run.kv_stop) for run in part.runs]
        q = torch.randn(batch, length, part.num_q, head_dim, generator=generator).to(dtype)
        k, v = torch.randn(2, batch, part.num_kv, 40, head_dim, generator=generator).to(dtype)
        first = torch.randint(0, 41 - length, (batch, 1), generator=generator)
        positions = first + torch.arange(length)
        got = attend(q, k, v, positions, runs, 0.3, cap, window).double()
        wanted = reference(q, k, v, positions, runs, 0.3, cap, window)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_scores_far_apart_and_very_large() -> None:
    for name in SETS:
        torch.ops.yoke_kernels.use_instruction_set(name)
        k = torch.zeros(1, 1, 4, 2)
        k[0, 0, :, 0] = torch.tensor([0.0, 1000.0, -1e30, 999.0])
        v = torch.arange(8.0).view(1, 1, 4, 2)
        q, where = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[3]])
        got = attend(q, k, v, where, [(0, 1, 0, 1)], 1.0)
        wanted = reference(q, k, v, where, [(0, 1, 0, 1)], 1.0, 0.0, 0)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("cap", "window"), [(0.0, 0), (3.0, 0), (0.0, 5)])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("length", [1, 3])
def test_the_layer_makes_the_same_with_torchs_attention(
    rank: int, length: int, cap: float, window: int
) -> None:
    """SmolLM2's heads on two ranks, of which one group is cut."""
    part = split_heads(9, 3, rank, 2)
    layer = CachedAttention(part, 16, 0.25, cap, window)
    layer.setup(2, 24, torch.zeros(1))
    layer.k_cache.normal_()
    layer.v_cache.normal_()
    q, k = torch.randn(2, length, part.num_q, 16), torch.randn(2, length, part.num_kv, 16)
    rows, positions = torch.arange(2)[:, None], torch.tensor([[3], [20]]) + torch.arange(length)
    mask = causal_mask(positions, 24, torch.float32, window)
    assert can_attend(q.device, q.dtype)
    own = layer(q, k, k, rows, positions, None)
    torch.testing.assert_close(own, layer(q, k, k, rows, positions, mask), rtol=1e-5, atol=1e-5)


def test_it_is_an_operator_that_torch_can_trace() -> None:
    q, cache = torch.randn(2, 4, 16), torch.randn(2, 2, 8, 16)
    rest = ([0, 4, 0, 2], 0.25, 0.0, 0)
    tests = ("test_schema", "test_faketensor")
    args = (q, cache, cache.clone(), torch.tensor([3, 7]), *rest)
    torch.library.opcheck(torch.ops.yoke_kernels.attend.default, args, test_utils=tests)
    chunk = (q.unsqueeze(1).expand(2, 3, 4, 16), cache, cache.clone(), torch.tensor([[1, 2, 3]] * 2))
    torch.library.opcheck(torch.ops.yoke_chunks.attend.default, (*chunk, *rest), test_utils=tests)


def test_what_is_not_in_use_is_not_read() -> None:
    """Beyond the last position there may be anything."""
    cache = torch.full((1, 1, 16, 8), float("nan"))
    cache[:, :, :6] = torch.randn(6, 8)
    for positions in (torch.tensor([[5]]), torch.arange(6)[None]):
        q = torch.randn(1, positions.shape[1], 2, 8)
        assert attend(q, cache, cache.clone(), positions, [(0, 2, 0, 1)], 1.0).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([[8], [0]])}, "position 8 in a cache of 8"),
        ({"positions": torch.tensor([[-1], [0]])}, "position -1"),
        ({"positions": torch.tensor([[1]])}, "positions must be"),
        ({"q": torch.zeros(2, 1, 4, 8)}, "does not go with caches"),
        ({"q": torch.zeros(2, 1, 4, 16).double()}, "the caches are Float"),
        ({"runs": [(0, 4, 0, 3)]}, "runs of heads"),
        ({"runs": [(0, 5, 0, 1)]}, "runs of heads"),
        ({"k_cache": torch.zeros(2, 2, 16, 8).transpose(2, 3)}, "must be contiguous"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict, message: str) -> None:
    given = {
        "q": torch.zeros(2, 1, 4, 16),
        "k_cache": torch.zeros(2, 2, 8, 16),
        "v_cache": torch.zeros(2, 2, 8, 16),
        "positions": torch.tensor([[1], [2]]),
        "runs": [(0, 4, 0, 2)],
        "scale": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        attend(**(given | change))
