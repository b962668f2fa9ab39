"""Draft tokens by prompt lookup, and the rule by which they are accepted, without a model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from engine import drafts
from engine.drafts import LONGEST, Index, look_up, verify_drafts
from models.sampling import Choice, Sampler, Sampling, distribution, make_sampler, start_row
from tests.engine.chances import chi_square, limit

VOCAB, LENGTH = 4, 3


def slow_look_up(text: list[int], count: int) -> list[int]:
    for length in range(min(LONGEST, len(text) - 1), 0, -1):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                draft = list(text)
                while len(draft) < len(text) + count:
                    draft.append(draft[place + len(draft) - len(text)])
                return draft[len(text) :]
    return []


def test_look_up_finds_what_a_search_of_the_text_finds() -> None:
    draw = random.Random(1)
    for vocab in (1, 2, 3, 10, 60):
        text, index = [draw.randrange(vocab)], Index()
        for _ in range(150):
            count = draw.randrange(6)
            assert look_up(index, text, count) == slow_look_up(text, count), text
            text += [draw.randrange(vocab) for _ in range(draw.randrange(1, 4))]


def test_the_longest_and_then_the_latest_occurrence_counts() -> None:
    assert look_up(Index(), [1, 2, 3, 4, 9, 3, 5, 2, 3], 2) == [4, 9]  # not 5, which follows a 3 alone
    assert look_up(Index(), [3, 4, 3, 5, 3], 2) == [5, 3]
    assert look_up(Index(), [1, 2, 3, 4], 4) == []
    assert look_up(Index(), [7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]  # past the end of the text


def answers(
    table: torch.Tensor, sampling: Sampling, count: int, rule: Callable[..., Any] = verify_drafts
) -> Counter[tuple[int, ...]]:
    """Answers of a model whose logits depend on the last token alone, to a prompt that ends with 0,
    with 0 to 3 random draft tokens."""
    found: Counter[tuple[int, ...]] = Counter()
    draw = random.Random(2)
    for begin in range(0, count, 512):
        sampler = make_sampler(512, VOCAB)
        texts: list[list[int]] = [[] for _ in range(512)]
        for row in range(512):
            start_row(sampler, row, Sampling(**vars(sampling) | {"seed": begin + row}), [0])

        def keep(row: int, token: int, _: Choice, texts: list[list[int]] = texts) -> bool:
            texts[row].append(token)
            return len(texts[row]) == LENGTH

        while going := [row for row in range(512) if len(texts[row]) < LENGTH]:
            drafted = {row: [draw.randrange(VOCAB) for _ in range(draw.randrange(4))] for row in going}
            contexts = [[*([0] + texts[row])[-1:], *drafted[row]] for row in going]
            logits = table[torch.tensor([token for context in contexts for token in context])]
            made = {row: len(texts[row]) for row in going}
            rule(sampler, logits, drafted, made, keep)
        found.update(tuple(text) for text in texts)
    return found


def accept_always(
    sampler: Sampler,
    logits: torch.Tensor,
    drafted: dict[int, list[int]],
    made: dict[int, int],
    keep: Callable[..., bool],
) -> None:
    """A wrong rule: every draft token is accepted."""
    ends = torch.tensor([len(draft) + 1 for draft in drafted.values()]).cumsum(0) - 1
    left = [not any(keep(row, token, None) for token in draft) for row, draft in drafted.items()]
    rest = [row for row, on in zip(drafted, left, strict=True) if on]
    counts = {row: made[row] + len(drafted[row]) for row in rest}
    verify_drafts(sampler, logits[ends[torch.tensor(left)]], {row: [] for row in rest}, counts, keep)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.8), Sampling(temperature=1.5, top_k=3, min_p=0.1)]
)
def test_kept_tokens_are_distributed_as_the_model_says(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
    sampler = make_sampler(VOCAB, VOCAB)
    for row in range(VOCAB):
        start_row(sampler, row, sampling, [0])
    p = distribution(sampler, table).double()
    wanted = {
        (a, b, c): float(p[0, a] * p[a, b] * p[b, c])
        for a, b, c in product(range(VOCAB), repeat=LENGTH)
    }
    value, cells = chi_square(answers(table, sampling, 12288), wanted)
    assert value < limit(cells)
    # A tenth of the answers suffices to detect wrong rules: one that accepts every draft token, and one
    # that goes on after a rejected draft token.
    value, cells = chi_square(answers(table, sampling, 2048, accept_always), wanted)
    assert value > 2 * limit(cells)
    monkeypatch.setattr(drafts, "is_accepted", lambda draft, depth, token: depth < len(draft))
    value, cells = chi_square(answers(table, sampling, 2048), wanted)
    assert value > 2 * limit(cells)


def test_penalties_count_the_tokens_that_were_kept() -> None:
    """A token may come once: of the draft tokens 2, 2 only the first is accepted."""
    sampler = make_sampler(1, VOCAB)
    start_row(sampler, 0, Sampling(presence_penalty=2.0), [0])
    logits = torch.tensor([[0.0, 0.5, 1.0, 0.2]]).expand(3, VOCAB)
    kept: list[int] = []

    def keep(row: int, token: int, choice: Choice) -> bool:
        kept.append(token)
        return False

    verdicts = verify_drafts(sampler, logits, {0: [2, 2]}, {0: 0}, keep)
    assert kept == [2, 1]
    assert (verdicts[0].accepted, verdicts[0].token) == (1, 1)
