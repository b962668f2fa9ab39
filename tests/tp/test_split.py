"""Who holds what, for every world size, in one process."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.errors import InputError
from models.config import expected_shapes
from models.presets import PRESETS
from models.sizes import layout_of
from tp.heads import split_heads
from tp.shard import find_spec, slices_of, split_units


@st.composite
def heads_and_ranks(draw: st.DrawFn) -> tuple[int, int, int]:
    num_kv = draw(st.integers(1, 16))
    num_q = num_kv * draw(st.integers(1, 16))
    return num_q, num_kv, draw(st.integers(1, min(num_q, 64)))


@given(heads_and_ranks())
def test_heads_are_split_evenly_and_meet_their_kv_heads(case: tuple[int, int, int]) -> None:
    num_q, num_kv, size = case
    group = num_q // num_kv
    seen = []
    for rank in range(size):
        heads = split_heads(num_q, num_kv, rank, size)
        assert num_q // size <= heads.num_q <= -(-num_q // size)
        # Each local query head, through its run, meets the KV head that the whole model gives it.
        for run in heads.runs:
            per_kv = (run.q_stop - run.q_start) // (run.kv_stop - run.kv_start)
            for local in range(run.q_start, run.q_stop):
                kv = run.kv_start + (local - run.q_start) // per_kv
                assert heads.kv_start + kv == (heads.q_start + local) // group
                seen.append(heads.q_start + local)
        assert len(heads.runs) <= 3  # a cut group at either end, whole groups between
        used = {kv for run in heads.runs for kv in range(run.kv_start, run.kv_stop)}
        assert used == set(range(heads.num_kv))
    assert seen == list(range(num_q))


@pytest.mark.parametrize(
    ("num_q", "num_kv", "size", "kv_of_ranks"),
    [
        (9, 3, 2, [(0, 2), (1, 3)]),  # SmolLM2-135M on two sockets: the middle KV head is shared
        (32, 8, 16, [(r // 2, r // 2 + 1) for r in range(16)]),
        (64, 8, 6, [(0, 2), (1, 3), (2, 4), (4, 6), (5, 7), (6, 8)]),
        (4, 1, 4, [(0, 1)] * 4),
    ],
)
def test_known_cases(num_q: int, num_kv: int, size: int, kv_of_ranks: list[tuple[int, int]]) -> None:
    heads = [split_heads(num_q, num_kv, rank, size) for rank in range(size)]
    assert [(part.kv_start, part.kv_stop) for part in heads] == kv_of_ranks


def test_more_ranks_than_query_heads_are_refused() -> None:
    with pytest.raises(InputError, match=r"10 ranks for 9 query heads.*--ranks 9"):
        split_heads(9, 3, 0, 10)


@given(st.integers(1, 4000), st.sampled_from([1, 32, 128]), st.integers(1, 64))
def test_units_cover_a_width_and_are_not_cut(size: int, unit: int, ranks: int) -> None:
    if size < ranks:
        with pytest.raises(InputError, match=f"{ranks} ranks cannot share an MLP width of {size}"):
            split_units(size, unit, 0, ranks)
        return
    parts = [split_units(size, unit, rank, ranks) for rank in range(ranks)]
    assert parts[0][0] == 0
    assert parts[-1][1] == size
    assert all(left[1] == right[0] for left, right in pairwise(parts))
    assert all(stop > start for start, stop in parts)
    if size % unit == 0 and size // unit >= ranks:
        assert all(start % unit == 0 for start, _ in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_every_element_of_every_weight_is_held(size: int) -> None:
    config = PRESETS["smollm2-135m"]
    layouts = [layout_of(config, rank, size) for rank in range(size)]
    for name, shape in expected_shapes(config).items():
        spec = find_spec(name)
        dim = spec.dim or 0
        held = set()
        for layout in layouts:
            part = slices_of(name, shape, layout)[dim]
            held |= set(range(part.start, part.stop))
            if spec.dim is None:
                assert part == slice(0, shape[dim])
        assert held == set(range(shape[dim])), name


def test_an_unknown_weight_is_named() -> None:
    with pytest.raises(InputError, match="rotary_emb"):
        find_spec("model.layers.0.self_attn.rotary_emb.inv_freq")
