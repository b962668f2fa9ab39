"""A beam search's bookkeeping, without a model: what ends, what goes on, and when it is over."""

from __future__ import annotations

import math
from itertools import product

import pytest

from engine.beam_plan import Beam, Beams, Candidate, Hypothesis, Search, advance

STOP = 9
TABLE = (  # of a Markov chain: the probabilities of tokens 0, 1, 2 and STOP, by the token before
    (0.05, 0.6, 0.25, 0.1),
    (0.3, 0.02, 0.38, 0.3),
    (0.5, 0.15, 0.05, 0.3),
)
TOKENS = (0, 1, 2, STOP)


def continuations(beams: Beams) -> list[Candidate]:
    """All of them, the most probable first. A text begins after a 0."""
    found = [
        Candidate(parent, token, beam.logprob + math.log(chance))
        for parent, beam in enumerate(beams.running)
        for token, chance in zip(TOKENS, TABLE[beam.tokens[-1] if beam.tokens else 0], strict=True)
    ]
    return sorted(found, key=lambda candidate: -candidate.logprob)


def run(search: Search) -> tuple[Beams, int]:
    """The end of the search, and its number of steps."""
    beams, steps = Beams(), 0
    while not beams.done:
        beams = advance(search, beams, continuations(beams)[: search.num_candidates])
        steps += 1
    return beams, steps


def every_text(length: int, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """All texts that end with STOP or are `length` long, with their scores, the best first."""
    texts = []
    for size in range(1, length + 1):
        for text in product(TOKENS, repeat=size):
            if STOP in text[:-1] or (size < length and text[-1] != STOP):
                continue
            pairs = zip((0, *text), text, strict=False)
            logprob = sum(math.log(TABLE[before][TOKENS.index(after)]) for before, after in pairs)
            texts.append((logprob / size**penalty, text))
    return sorted(texts, reverse=True)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
def test_a_search_wide_enough_finds_all_texts_in_their_order(penalty: float) -> None:
    wanted = every_text(5, penalty)
    beams, steps = run(Search(len(wanted) + 1, penalty, 5, frozenset({STOP})))
    assert steps == 5
    assert len(beams.finished) == len(wanted) == 364
    assert sorted(h.tokens for h in beams.finished) == sorted(text for _, text in wanted)
    for found, (score, _) in zip(beams.finished, wanted, strict=True):
        assert found.score == pytest.approx(score, rel=1e-12)
    assert beams.finished[0].tokens == wanted[0][1]
    assert all(h.stopped == (h.tokens[-1] == STOP) for h in beams.finished)


def test_one_beam_takes_the_most_probable_token_each_time() -> None:
    beams, _ = run(Search(1, 1.0, 6))
    assert beams.finished[0].tokens == (1, 2, 0, 1, 2, 0)


def test_only_the_best_continuations_finish_and_enough_others_go_on() -> None:
    beams = Beams((Beam((1,), -1.0, 0), Beam((2,), -2.0, 0)))
    search = Search(2, 0.0, 10, frozenset({8, STOP}))
    assert search.num_candidates == 6
    seen = [(0, STOP, -1.1), (0, 3, -1.2), (1, STOP, -2.1), (1, 8, -2.2), (1, 4, -2.3), (0, 5, -3.0)]
    after = advance(search, beams, [Candidate(*values) for values in seen])
    assert after.finished == (Hypothesis((1, STOP), -1.1, True),)  # the third and fourth came too late
    assert after.running == (Beam((1, 3), -1.2, 0), Beam((2, 4), -2.3, 1))
    assert not after.done


def test_finished_texts_are_exchanged_for_better_ones() -> None:
    old = Hypothesis((1, STOP), -0.5, True), Hypothesis((2, STOP), -3.0, True)
    beams = Beams((Beam((4, 4), -1.0, 0), Beam((5, 5), -1.5, 1)), old)
    search = Search(2, 1.0, 10, frozenset({STOP}))
    seen = [(0, STOP, -1.8), (1, STOP, -2.4), (0, 3, -3.0), (1, 3, -3.6)]
    after = advance(search, beams, [Candidate(*values) for values in seen])
    assert [(h.tokens, h.score) for h in after.finished] == [
        ((1, STOP), -0.5),
        ((4, 4, STOP), pytest.approx(-0.6)),
    ]
    assert after.done  # -3.0 / 3 is below -0.6


@pytest.mark.parametrize(("worst", "done"), [(-0.999, True), (-1.0, True), (-1.001, False)])
def test_it_is_over_when_the_running_cannot_better_the_worst_finished(worst: float, done: bool) -> None:
    kept = Hypothesis((1, STOP), -0.1, True), Hypothesis((2, STOP), worst, True)
    beams = Beams((Beam((4,), -1.0, 0),), kept)
    after = advance(Search(2, 1.0, 10, frozenset({STOP})), beams, [Candidate(0, 4, -2.0)])
    assert after.done == done
    # With a free place anything betters it.
    beams = Beams(beams.running, kept[:1])
    assert not advance(Search(2, 1.0, 10, frozenset({STOP})), beams, [Candidate(0, 4, -90.0)]).done


def test_it_is_over_when_nothing_can_go_on() -> None:
    after = advance(Search(2, 1.0, 10, frozenset({STOP})), Beams(), [Candidate(0, STOP, -0.5)])
    assert after == Beams((), (Hypothesis((STOP,), -0.5, True),), True)
    after = advance(Search(2, 1.0, 1), Beams(), [Candidate(0, t, -float(t)) for t in (1, 2, 3)])
    assert after.running == ()
    assert after.finished == (Hypothesis((1,), -1.0, False), Hypothesis((2,), -2.0, False))
    assert after.done
