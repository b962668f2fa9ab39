"""The bookkeeping of a beam search: which texts continue, which are finished, when it ends. Pure.

The semantics are those of transformers' `generate(num_beams=W, do_sample=False, early_stopping=False)`
(5.23, `_beam_search`), for one prompt:

- Candidates are the (1 + number of stop tokens) * W most probable continuations of all running texts
  (at least 2 * W), so that W of them can continue, whichever ones end.
- A candidate ends with a stop token, or at the maximum length. It is finished if it is among the W most
  probable, and dropped otherwise. Its score is its log-probability / length ** length_penalty; the stop
  token counts in both. The best W finished texts are kept.
- The search ends when no text can continue, or when W texts are finished and the most probable running
  text, scored at its present length, is no better than the worst of them. With length_penalty > 0 that
  is a heuristic: a longer text might have become better.

One difference: transformers fills unused beams with texts of log-probability -1e9; here there are fewer
running texts. Does not import torch; `engine.beams` computes the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Search:
    """The settings of a search for the best texts of up to `max_new_tokens` tokens, with `num_beams`
    running texts.

    `length_penalty` above 0 favors long texts, below 0 short ones. It is from -10 to 10, so that
    length ** length_penalty stays in a float's range.
    """

    num_beams: int
    length_penalty: float
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()

    @property
    def num_candidates(self) -> int:
        """How many candidates `advance` needs."""
        return max(2, 1 + len(self.stop_tokens)) * self.num_beams

    def score(self, logprob: float, length: int) -> float:
        """The score by which finished texts are compared."""
        return logprob / length**self.length_penalty


class Candidate(NamedTuple):
    """A continuation of running text `parent` by `token`; `logprob` is that of the whole text."""

    parent: int
    token: int
    logprob: float


@dataclass(frozen=True)
class Beam:
    """A running text. `parent`: the index of the running text of the previous step that it
    continues."""

    tokens: tuple[int, ...]
    logprob: float
    parent: int


@dataclass(frozen=True)
class Hypothesis:
    """A finished text. If it `stopped`, its stop token is the last of `tokens`."""

    tokens: tuple[int, ...]
    score: float
    stopped: bool


@dataclass(frozen=True)
class Beams:
    """The state of a search between two steps. `running`: 1 to num_beams texts of the same length, the
    most probable first (none only when done). `finished`: up to num_beams texts, the best first."""

    running: tuple[Beam, ...] = (Beam((), 0.0, 0),)
    finished: tuple[Hypothesis, ...] = ()
    done: bool = False


def advance(search: Search, beams: Beams, candidates: Sequence[Candidate]) -> Beams:
    """Advance the search by one step. `candidates` are the `num_candidates` most probable continuations
    of `beams.running`, the most probable first; all of them if there are fewer, but at least one."""
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
    finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: on ties the older first
    del finished[search.num_beams :]
    return Beams(tuple(running), tuple(finished), not _improvable(search, running, finished, length))


def _improvable(
    search: Search, running: Sequence[Beam], finished: Sequence[Hypothesis], length: int
) -> bool:
    if not running or len(finished) < search.num_beams:
        return bool(running)
    return search.score(running[0].logprob, length) > finished[-1].score
