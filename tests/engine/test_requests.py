"""Prompts are packed into calls without loss, and what does not fit is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.errors import InputError
from engine.requests import check_request, split_prompts


@given(
    prompts=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=6),
    chunk=st.integers(1, 16),
    mixed=st.booleans(),
)
def test_every_token_is_run_once_and_in_order(
    prompts: list[tuple[int, int]], chunk: int, mixed: bool
) -> None:
    """`prompts`: tokens that are in the cache already, and those that are not."""
    rows = [(row, begin, begin + size) for row, (begin, size) in enumerate(prompts)]
    calls = list(split_prompts(rows, chunk, mixed))
    run = [(p.row, i) for call in calls for p in call for i in range(p.begin, p.end)]
    assert run == [(row, i) for row, begin, end in rows for i in range(begin, end)]
    for call in calls:
        assert 1 <= sum(piece.end - piece.begin for piece in call) <= chunk
        assert mixed or len({piece.row for piece in call}) == 1
    if mixed:
        assert len(calls) == -(-len(run) // chunk)


def test_prompt_and_answer_must_fit_together() -> None:
    check_request(60, 40, 100)
    with pytest.raises(InputError, match=r"line 3 has 61 tokens: .* needs max_seq_len=101 or more"):
        check_request(61, 40, 100, "line 3")
    with pytest.raises(InputError, match="has no tokens"):
        check_request(0, 40, 100)
