"""Speculative decoding: runs draft tokens behind the last token in one call, keeps the accepted prefix.

A decode step is memory-bound: it reads all weights, and takes hardly longer for a few tokens than for
one. So each round proposes draft tokens for every sequence, by look-up in its text or with a small
model, runs its last token and the draft tokens in one call, and keeps those that the model itself would
have chosen (`engine.drafts`; the text equals that of `engine.loop`). The prompt of a new request is
part of the same call, like any other tokens that are not in the cache yet.

Every rank holds the texts of all sequences, so all ranks propose the same draft tokens. Rank 0 verifies
them, since it samples and knows the stop strings. It broadcasts three numbers for each sequence: how
many draft tokens were accepted, the token that follows them, and whether the text has ended. Rejected
tokens leave keys in the cache, at positions beyond the text. The next round begins at the first of
these positions, and writes keys before it attends to them. A round never proposes more tokens than the
answer has room for, so nothing is written beyond its end.

Not here: draft tokens with engine=hf, whose steps are padded; trees of draft tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comm import ops
from engine.drafts import Index, look_up, verify_drafts
from engine.loop import Watcher, Work, answer_of, begin_of, logprobs_of, take
from engine.requests import Answer, Request
from engine.steps import GREEDY, Runner, Span, extend_rows
from models.sampling import Choice, Sampler, make_sampler, not_finite, start_row


@dataclass
class DraftedSlot:
    """A sequence in a cache slot, as every rank knows it. The model's cache holds the keys of its first
    `known` tokens, the draft model's cache those of its first `known_to_draft`."""

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
    """As `engine.loop.generate`, with up to `draft_tokens` draft tokens for each sequence in a round.

    `draft` runs the draft model, which proposes its greedy tokens; None: prompt lookup. It has as many
    slots as `runner`, of the same length, and the same vocabulary and group. Its cache may lack the
    last tokens of an earlier answer, so it runs every prompt from the start, even where the model's
    cache holds the beginning (`Request.cached`). Raises InputError where logits are not finite.
    """
    watcher = watcher or Watcher()
    start = time.perf_counter()
    sampler = None
    if runner.group.rank == 0:
        sampler = make_sampler(runner.num_rows, runner.vocab_size, runner.device)
    waiting = deque(enumerate(requests))
    rows: dict[int, DraftedSlot] = {}
    answers: dict[int, Answer] = {}
    while waiting or rows:
        runner.check()
        if draft is not None:
            draft.check()
        for place in range(runner.num_rows):
            if waiting and place not in rows:
                rows[place] = _admit(*waiting.popleft(), place, sampler)
        drafts = _propose(runner, rows, draft, draft_tokens)
        spans = [
            Span(place, row.known, row.text[row.known :] + drafts[place], 1 + len(drafts[place]))
            for place, row in rows.items()
        ]
        logits = extend_rows(runner, spans)
        found = [[0, 0, 0]] * runner.num_rows
        if sampler is not None:
            found = _verify(sampler, logits, drafts, rows, requests, stop_tokens, watcher)
        found = ops.broadcast(torch.tensor(found, device=runner.device), 0, runner.group).tolist()
        for place, row in list(rows.items()):
            accepted, token, ended = found[place]
            _move_on(row, drafts[place], accepted, token)
            if ended:
                answers[row.work.request] = answer_of(row.work, start)
                if sampler is not None:
                    watcher.on_end(row.work.request, answers[row.work.request])
                del rows[place]
    return [answers[i] for i in range(len(requests))]


def _admit(index: int, request: Request, place: int, sampler: Sampler | None) -> DraftedSlot:
    if sampler is not None:
        start_row(sampler, place, request.sampling, request.prompt, request.name)
    work = Work(index, request.prompt, request.max_new_tokens, request.name)
    return DraftedSlot(work, list(request.prompt), begin_of(request))


def _verify(
    sampler: Sampler,
    logits: Tensor,
    drafts: Mapping[int, Sequence[int]],
    rows: Mapping[int, DraftedSlot],
    requests: Sequence[Request],
    stop_tokens: frozenset[int],
    watcher: Watcher,
) -> list[list[int]]:
    """What rank 0 broadcasts for each slot: how many draft tokens were accepted, the last token, and
    whether the text has ended."""

    def keep(place: int, token: int, choice: Choice) -> bool:
        work = rows[place].work
        logprobs = logprobs_of(choice, place, requests[work.request])
        take(work, token, time.perf_counter(), stop_tokens, watcher, logprobs)
        return bool(work.finish)

    verdicts = verify_drafts(
        sampler, logits, drafts, {place: row.made for place, row in rows.items()}, keep
    )
    gone = watcher.cancelled()
    found = [[0, 0, 0] for _ in sampler.rows]
    for place, verdict in verdicts.items():
        work = rows[place].work
        if work.request in gone and not work.finish:
            work.finish = "cancelled"
        found[place] = [verdict.accepted, verdict.token, int(bool(work.finish))]
    return found


def _move_on(row: DraftedSlot, drafted: Sequence[int], accepted: int, token: int) -> None:
    """Append a round's tokens to the text, and record how much of it the caches hold. The model's cache
    lacks only the new token. The draft model never ran its last draft token, so its cache may lack one
    more."""
    row.work.drafted += len(drafted)
    row.work.accepted += accepted
    row.known = len(row.text) + accepted
    if drafted:
        row.known_to_draft = len(row.text) + min(accepted, len(drafted) - 1)
    row.text += [*drafted[:accepted], token]


def _propose(
    runner: Runner, rows: Mapping[int, DraftedSlot], draft: Runner | None, draft_tokens: int
) -> dict[int, list[int]]:
    """Draft tokens for every slot. None before the first token, so that it does not come later; never
    more than the answer has room for, nor, over all slots, than one call takes."""
    room = min(draft_tokens, runner.chunk // len(rows) - 1)
    counts = {
        place: max(0, min(room, row.work.max_new_tokens - row.made - 1)) if row.made else 0
        for place, row in rows.items()
    }
    if draft is not None:
        return _propose_greedy(draft, rows, counts)
    return {place: look_up(row.index, row.text, counts[place]) for place, row in rows.items()}


def _propose_greedy(
    draft: Runner, rows: Mapping[int, DraftedSlot], counts: Mapping[int, int]
) -> dict[int, list[int]]:
    """The draft model's next `counts` greedy tokens for each slot.

    It first runs the tokens that are not in its cache yet. Then all slots decode together. A slot that
    has enough tokens repeats its last draft token's step. A slot without draft tokens runs at the first
    position that its cache does not hold: what is written there is overwritten before anything attends
    to it. Raises InputError on every rank where the draft model's logits are not finite (`ops.argmax`).
    """
    drafting = [place for place, count in counts.items() if count]
    drafts: dict[int, list[int]] = {place: [] for place in counts}
    if not drafting:
        return drafts
    spans = [
        Span(place, rows[place].known_to_draft, rows[place].text[rows[place].known_to_draft :])
        for place in drafting
    ]
    first = ops.whole_argmax(extend_rows(draft, spans))
    tokens, positions, left = torch.zeros(3, draft.num_rows, dtype=torch.int64, device=draft.device)
    for place, row in rows.items():
        positions[place] = len(row.text) if counts[place] else row.known_to_draft
        left[place] = counts[place]
    tokens[drafting] = first
    made = [tokens]
    # Separate tensors: two that share memory would need another graph.
    tokens, positions = tokens.clone(), positions.clone()
    for _ in range(max(counts.values()) - 1):
        left -= 1
        going = left > 0
        tokens = torch.where(going, draft.steps[GREEDY](tokens.clamp(min=0), positions), tokens)
        positions = positions + going
        made.append(tokens)
    for place, *drafted in zip(range(draft.num_rows), *torch.stack(made).tolist(), strict=True):
        if place in drafts:
            drafts[place] = drafted[: counts[place]]
            if (worst := min(drafts[place], default=0)) < 0:
                raise not_finite(ops.value_of(worst), f"the draft model for {rows[place].work.name}")
    return drafts
