"""Beam search: the loop over steps for a prompt whose continuations share the cache's rows.

The prompt is run once, in row 0. From then on beam i writes its own token's keys into row i, and no row
is ever copied: `sources` [W, S] says for each beam and position in which row the keys lie. When beams
go on from others, they take over the sources of these, and the new position is each beam's own row.
That position is new to all rows, so nothing is overwritten that a beam still reads.

Rank 0 decides (`engine.beam_plan`) and tells the others what goes on: sums of log-probabilities might
differ in a last bit on another rank.

What is not here: stop texts, sampling and penalties, which `engine.job` refuses beside beams.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import InputError
from comm import ops
from engine.beam_plan import Beams, Candidate, Hypothesis, Search, advance
from engine.loop import Watcher
from engine.requests import Answer, Request, pack
from engine.steps import BEAMS, Runner, extend


@dataclass(frozen=True)
class Outcome:
    """What a search found, the best first (fewer, or nothing, where it was cancelled; nothing on other
    ranks than 0), and when each of its steps was decided, in seconds."""

    hypotheses: tuple[Hypothesis, ...]
    times: tuple[float, ...]
    cancelled: bool


def generate_beams(
    runner: Runner,
    requests: Sequence[Request],
    stop_tokens: frozenset[int] = frozenset(),
    length_penalty: float = 1.0,
    watcher: Watcher | None = None,
) -> list[Answer]:
    """Continue every request's prompt, one after the other, with as many beams as the runner has rows;
    answers in order (complete on rank 0 alone).

    As `engine.loop.generate`, but `watcher.on_token` gets an answer's tokens when all are known, and
    what it returns changes nothing.
    """
    watcher = watcher or Watcher()
    answers = []
    for index, request in enumerate(requests):
        gone = _cancelled(watcher, index)
        answers.append(beam_search(runner, request, stop_tokens, length_penalty, gone))
        if runner.group.rank == 0:
            for token in answers[-1].tokens:
                watcher.on_token(index, token)
            watcher.on_end(index, answers[-1])
    return answers


def _cancelled(watcher: Watcher, index: int) -> Callable[[], bool]:
    return lambda: index in watcher.cancelled()


def beam_search(
    runner: Runner,
    request: Request,
    stop_tokens: frozenset[int] = frozenset(),
    length_penalty: float = 1.0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Answer:
    """The best text of a beam search as wide as the runner has rows, complete on rank 0 alone.

    Its `ttft_s` is the time to the first candidates, its `tpot_s` that of a step after it. A search
    that is `cancelled` (asked on rank 0 after each step) has no tokens.
    """
    search = Search(runner.num_rows, length_penalty, request.max_new_tokens, stop_tokens)
    start = time.perf_counter()
    outcome = find(runner, request.prompt, search, cancelled, request.name)
    times = outcome.times
    tokens: tuple[int, ...] = ()
    finish = "cancelled"
    if outcome.hypotheses and not outcome.cancelled:
        best = outcome.hypotheses[0]
        tokens = best.tokens[:-1] if best.stopped else best.tokens
        finish = "stop" if best.stopped else "length"
    tpot_s = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return Answer(tokens=tokens, finish=finish, ttft_s=times[0] - start, tpot_s=tpot_s)


@torch.no_grad()
def find(
    runner: Runner,
    prompt: Sequence[int],
    search: Search,
    cancelled: Callable[[], bool] = lambda: False,
    name: str = "a text",
) -> Outcome:
    """Search from `prompt`, which the cache need not hold. All ranks pass the same, and the runner has
    `search.num_beams` rows. Raises InputError, that calls the prompt `name`, where the model's logits
    are not numbers."""
    assert runner.num_rows == search.num_beams
    width, device = runner.num_rows, runner.device
    rows = torch.arange(width, dtype=torch.int32, device=device)
    sources = torch.zeros(width, runner.cache_len, dtype=torch.int32, device=device)
    logits = _run_prompt(runner, prompt)
    beams, times, gone = Beams(), [], False
    for position in range(len(prompt), len(prompt) + search.max_new_tokens):
        if runner.group.rank == 0:
            beams = advance(search, beams, likeliest(search, beams, logits, name))
            gone = cancelled()
        done, parents, tokens = _tell(runner, beams, gone)
        times.append(time.perf_counter())
        if done:
            break
        sources = sources[torch.tensor(parents, device=device)]
        sources[:, position] = rows
        logits = runner.steps[BEAMS](
            torch.tensor(tokens, device=device),
            torch.full((width,), position, device=device),
            sources,
        )
    return Outcome(beams.finished, tuple(times), gone)


def _run_prompt(runner: Runner, prompt: Sequence[int]) -> Tensor:
    """Fill row 0; the logits after the prompt, [1, vocab_size]."""
    logits = torch.empty(0)
    for (piece,) in pack([(0, 0, len(prompt))], runner.chunk, mixed=False):
        size = piece.end - piece.begin
        wanted = [size - 1] if piece.end == len(prompt) else []
        tokens = prompt[piece.begin : piece.end]
        logits = extend(runner, tokens, range(piece.begin, piece.end), [0] * size, wanted)
    return logits


def likeliest(search: Search, beams: Beams, logits: Tensor, name: str = "a text") -> list[Candidate]:
    """The continuations that `advance` wants, without impossible ones. Row i of `logits`, float32
    [1 or W, V], follows running text i; rows behind these are left alone. Sums are float32, as in
    transformers. Raises InputError where the best is not finite."""
    logprobs = torch.tensor([beam.logprob for beam in beams.running], device=logits.device)
    sums = logits[: len(logprobs)].log_softmax(-1).add_(logprobs[:, None])
    best = sums.flatten().topk(min(search.num_candidates, sums.numel()))
    values = best.values.tolist()
    if not math.isfinite(values[0]):
        raise InputError(
            f"the best log-probability of {name} is {values[0]}, not a finite number: the weights are "
            "damaged, or the model's sums overflow its dtype; try dtype=float32, or another copy"
        )
    places = (divmod(index, logits.shape[1]) for index in best.indices.tolist())
    return [
        Candidate(parent, token, value)
        for (parent, token), value in zip(places, values, strict=True)
        if value > -math.inf
    ]


def _tell(runner: Runner, beams: Beams, gone: bool) -> tuple[bool, list[int], list[int]]:
    """Rank 0's decision on every rank: whether the search is over, and each row's parent and token.
    Rows without a beam repeat the first, and nothing looks at them."""
    width = runner.num_rows
    said = [0] * (1 + 2 * width)
    if runner.group.rank == 0:
        said[0] = beams.done or gone
        spare = width - len(beams.running)
        running = [*beams.running, *beams.running[:1] * spare]
        if running:
            said[1:] = [*(beam.parent for beam in running), *(beam.tokens[-1] for beam in running)]
    heard = torch.tensor(said, dtype=torch.int64, device=runner.device)
    said = ops.broadcast(heard, 0, runner.group).tolist()
    return bool(said[0]), said[1 : 1 + width], said[1 + width :]
