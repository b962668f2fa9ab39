"""The loop with guesses: several tokens of a row are run at once, and those kept that were foretold.

A token's step reads all weights, and takes hardly longer for a few tokens than for one. So each round
guesses how every row goes on, by look-up in its text or by a small model, runs the last tokens with the
guesses behind them in one call, and keeps what the model itself would have said (`engine.drafts`: the
text is the one that `engine.loop` makes). A new row's prompt goes with the round like anything else
that is not in the cache yet.

Each rank holds the rows' texts and so makes the same guesses; rank 0 judges them, since it samples and
knows of stop strings, and tells of every row how many were right, the token behind them and whether
the text ended. Wrong guesses leave keys in the cache, at positions beyond the text: the next round
begins with the first of those, and writes before it attends. Guesses are no more than what an answer
may still hold, so nothing is ever written beyond its end.

What is not here: guesses for engine=hf, whose steps are padded; trees of guesses.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comm import ops
from engine.drafts import Index, judge, look_up
from engine.loop import Watcher, Work, answer_of, begin_of, logprobs_of, take
from engine.requests import Answer, Request
from engine.steps import GREEDY, Runner, Span, extend_rows
from models.sampling import Choice, Sampler, make_sampler, not_finite, start_row


@dataclass
class Row:
    """A row's text, as every rank knows it. The keys of its first `known` tokens lie in the model's
    cache, those of the first `known_to_draft` in the draft model's."""

    work: Work
    text: list[int]
    known: int
    known_to_draft: int = 0
    index: Index = field(default_factory=Index)

    @property
    def made(self) -> int:
        return len(self.text) - len(self.work.prompt)


@torch.no_grad()
def generate(
    runner: Runner,
    requests: Sequence[Request],
    stop_tokens: frozenset[int] = frozenset(),
    watcher: Watcher | None = None,
    draft: Runner | None = None,
    draft_tokens: int = 4,
) -> list[Answer]:
    """`engine.loop.generate` with up to `draft_tokens` guesses a round, by the model of `draft` or, if
    that is None, by look-up.

    `draft` has as many rows as `runner`, of the same length, and the same vocabulary and group; its
    guesses are the tokens that it finds likeliest. Its cache may lack the last tokens of an earlier
    answer, so prompts that lie in the model's cache already (`Request.cached`) it runs whole.
    """
    watcher = watcher or Watcher()
    start = time.perf_counter()
    sampler = None
    if runner.group.rank == 0:
        sampler = make_sampler(runner.num_rows, runner.vocab_size, runner.device)
    waiting = deque(enumerate(requests))
    rows: dict[int, Row] = {}
    answers: dict[int, Answer] = {}
    while waiting or rows:
        for place in range(runner.num_rows):
            if waiting and place not in rows:
                rows[place] = _admit(*waiting.popleft(), place, sampler)
        guesses = _guess(runner, rows, draft, draft_tokens)
        spans = [
            Span(place, row.known, row.text[row.known :] + guesses[place], 1 + len(guesses[place]))
            for place, row in rows.items()
        ]
        logits = extend_rows(runner, spans)
        found = [[0, 0, 0]] * runner.num_rows
        if sampler is not None:
            found = _judge(sampler, logits, guesses, rows, requests, stop_tokens, watcher)
        found = ops.broadcast(torch.tensor(found, device=runner.device), 0, runner.group).tolist()
        for place, row in list(rows.items()):
            accepted, token, ended = found[place]
            _move_on(row, guesses[place], accepted, token)
            if ended:
                answers[row.work.request] = answer_of(row.work, start)
                if sampler is not None:
                    watcher.on_end(row.work.request, answers[row.work.request])
                del rows[place]
    return [answers[i] for i in range(len(requests))]


def _admit(index: int, request: Request, place: int, sampler: Sampler | None) -> Row:
    if sampler is not None:
        start_row(sampler, place, request.sampling, request.prompt, request.name)
    work = Work(index, request.prompt, request.max_new_tokens, request.name)
    return Row(work, list(request.prompt), begin_of(request))


def _judge(
    sampler: Sampler,
    logits: Tensor,
    guesses: Mapping[int, Sequence[int]],
    rows: Mapping[int, Row],
    requests: Sequence[Request],
    stop_tokens: frozenset[int],
    watcher: Watcher,
) -> list[list[int]]:
    """What rank 0 tells of each row: the number of right guesses, the last token, whether the text
    ended."""

    def keep(place: int, token: int, choice: Choice) -> bool:
        work = rows[place].work
        logprobs = logprobs_of(choice, place, requests[work.request])
        take(work, token, time.perf_counter(), stop_tokens, watcher, logprobs)
        return bool(work.finish)

    verdicts = judge(sampler, logits, guesses, {place: row.made for place, row in rows.items()}, keep)
    gone = watcher.cancelled()
    found = [[0, 0, 0] for _ in sampler.rows]
    for place, verdict in verdicts.items():
        work = rows[place].work
        if work.request in gone and not work.finish:
            work.finish = "cancelled"
        found[place] = [verdict.accepted, verdict.token, int(bool(work.finish))]
    return found


def _move_on(row: Row, guess: Sequence[int], accepted: int, token: int) -> None:
    """What a round has made of a row, and how much of it the caches know: of the model, all but the new
    token; of the draft model, which never ran its last guess, perhaps one token less."""
    row.work.drafted += len(guess)
    row.work.accepted += accepted
    row.known = len(row.text) + accepted
    if guess:
        row.known_to_draft = len(row.text) + min(accepted, len(guess) - 1)
    row.text += [*guess[:accepted], token]


def _guess(
    runner: Runner, rows: Mapping[int, Row], draft: Runner | None, draft_tokens: int
) -> dict[int, list[int]]:
    """How every row may go on. There is none for a first token, which nobody should wait longer for,
    nor more than fit the answer or, together, one call."""
    room = min(draft_tokens, runner.chunk // len(rows) - 1)
    counts = {
        place: max(0, min(room, row.work.max_new_tokens - row.made - 1)) if row.made else 0
        for place, row in rows.items()
    }
    if draft is not None:
        return _ask(draft, rows, counts)
    return {place: look_up(row.index, row.text, counts[place]) for place, row in rows.items()}


def _ask(draft: Runner, rows: Mapping[int, Row], counts: Mapping[int, int]) -> dict[int, list[int]]:
    """The draft model's likeliest `counts` tokens of each row.

    It first runs what it has not seen of the texts. Then rows go in step: those that have enough stand
    still, at the last guess, and those without any at the first position that their cache does not
    know yet: what is written there is overwritten before anything attends to it. Raises InputError,
    on every rank, where a guess is none (`ops.argmax`).
    """
    asked = [place for place, count in counts.items() if count]
    guesses: dict[int, list[int]] = {place: [] for place in counts}
    if not asked:
        return guesses
    spans = [
        Span(place, rows[place].known_to_draft, rows[place].text[rows[place].known_to_draft :])
        for place in asked
    ]
    first = ops.whole_argmax(extend_rows(draft, spans))
    tokens, positions, left = torch.zeros(3, draft.num_rows, dtype=torch.int64, device=draft.device)
    for place, row in rows.items():
        positions[place] = len(row.text) if counts[place] else row.known_to_draft
        left[place] = counts[place]
    tokens[asked] = first
    made = [tokens]
    # Tensors of their own: two that share memory would be another graph.
    tokens, positions = tokens.clone(), positions.clone()
    for _ in range(max(counts.values()) - 1):
        left -= 1
        going = left > 0
        tokens = torch.where(going, draft.steps[GREEDY](tokens.clamp(min=0), positions), tokens)
        positions = positions + going
        made.append(tokens)
    for place, *guess in zip(range(draft.num_rows), *torch.stack(made).tolist(), strict=True):
        if place in guesses:
            guesses[place] = guess[: counts[place]]
            if (worst := min(guesses[place], default=0)) < 0:
                raise not_finite(ops.value_of(worst), f"the draft model for {rows[place].work.name}")
    return guesses
