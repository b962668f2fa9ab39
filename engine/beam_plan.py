"""The bookkeeping of a beam search: which texts go on, which are finished, when it is over. Pure.

The semantics are those of transformers' `generate(num_beams=W, do_sample=False, early_stopping=False)`
(5.23, `_beam_search`), of one prompt:

- Of all continuations of the running texts the (1 + number of stop tokens) * W likeliest are looked at
  (2 * W at least), so that W of them can go on whatever ends.
- One that ends (with a stop token, or because the answer is long enough) is finished if it is among
  the W likeliest, and dropped otherwise. Its score is its log-probability / length ** length_penalty;
  the stop token counts in both. The best W are kept.
- It is over when nothing can go on, or when W are finished and the likeliest running text, scored at
  its present length, is no better than the worst of them. With length_penalty > 0 that is a heuristic:
  a longer text might have become better.

What differs: transformers fills places that no text has with texts of log-probability -1e9; here there
are fewer running texts. Free of torch; `engine.beams` finds the continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Search:
    """What is searched for: the best texts of up to `max_new_tokens`, with `num_beams` running at once.

    `length_penalty` above 0 favors long texts, below 0 short ones; at most 10 either way, so that no
    length to its power leaves a float's range.
    """

    num_beams: int
    length_penalty: float
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()

    @property
    def num_candidates(self) -> int:
        """How many continuations `advance` wants to see."""
        return max(2, 1 + len(self.stop_tokens)) * self.num_beams

    def score(self, logprob: float, length: int) -> float:
        """By which finished texts are compared."""
        return logprob / length**self.length_penalty


class Candidate(NamedTuple):
    """A continuation: of which running text, by which token, and the log-probability of the whole."""

    parent: int
    token: int
    logprob: float


@dataclass(frozen=True)
class Beam:
    """A text that goes on, and which of the running texts of the step before it continues."""

    tokens: tuple[int, ...]
    logprob: float
    parent: int


@dataclass(frozen=True)
class Hypothesis:
    """A finished text, its stop token included where it has `stopped`."""

    tokens: tuple[int, ...]
    score: float
    stopped: bool


@dataclass(frozen=True)
class Beams:
    """A search between two steps. `running` has 1 to num_beams texts of one length, the likeliest first
    (none only when done); `finished` up to num_beams, the best first."""

    running: tuple[Beam, ...] = (Beam((), 0.0, 0),)
    finished: tuple[Hypothesis, ...] = ()
    done: bool = False


def advance(search: Search, beams: Beams, candidates: Sequence[Candidate]) -> Beams:
    """One step: `candidates` are the `num_candidates` likeliest continuations of `beams.running`, the
    likeliest first; all where there are fewer, but one at least."""
    length = len(beams.running[0].tokens) + 1
    running: list[Beam] = []
    finished = list(beams.finished)
    for place, (parent, token, logprob) in enumerate(candidates):
        stopped = token in search.stop_tokens
        ends = stopped or length == search.max_new_tokens
        if (place if ends else len(running)) >= search.num_beams:
            continue
        tokens = (*beams.running[parent].tokens, token)
        if ends:
            finished.append(Hypothesis(tokens, search.score(logprob, length), stopped))
        else:
            running.append(Beam(tokens, logprob, parent))
    finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: of equal ones the older
    del finished[search.num_beams :]
    return Beams(tuple(running), tuple(finished), not _improvable(search, running, finished, length))


def _improvable(
    search: Search, running: Sequence[Beam], finished: Sequence[Hypothesis], length: int
) -> bool:
    if not running or len(finished) < search.num_beams:
        return bool(running)
    return search.score(running[0].logprob, length) > finished[-1].score
