"""Beam search: the loop over decode steps for one prompt. The beams share the rows of the KV cache.

The prompt is run once, in row 0. From then on beam i writes the keys of its own tokens into row i, and
no row is ever copied: `sources` [W, S] holds, for each beam and position, the row with the keys. A beam
that continues another one takes over that beam's sources; for the new position its source is its own
row. No row holds that position yet, so nothing is overwritten that a beam still reads.

Rank 0 decides (`engine.beam_plan`) and broadcasts which beams continue: on another rank, sums of
log-probabilities could differ in the last bit.

Not here: stop strings, sampling and penalties, which `engine.job` refuses together with beams.
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
from engine.requests import Answer, Request, split_prompts
from engine.steps import BEAMS, Runner, extend


@dataclass(frozen=True)
class Outcome:
    """The result of a search. `hypotheses`: the best first; fewer or none if it was cancelled; none on
    ranks other than 0. `times`: when each step was decided, in seconds of `time.perf_counter`."""

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
    """Continue the requests' prompts one after the other, with as many beams as the runner has slots.

    Returns the answers in order, complete on rank 0 only. As `engine.loop.generate`, but
    `watcher.on_token` gets an answer's tokens when all are known, and its return value is ignored.
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
    """Run one beam search, as wide as the runner has slots; returns its best text, complete on rank 0
    only.

    `ttft_s` is the time to the first candidates, `tpot_s` the mean time of a later step. `cancelled` is
    called on rank 0 after each step; a cancelled search has no tokens.
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
    """Search from `prompt`, which is run here. All ranks pass the same arguments; the runner has
    `search.num_beams` slots. Raises InputError that names the prompt, `name`, if the model's logits are
    not finite."""
    assert runner.num_rows == search.num_beams
    width, device = runner.num_rows, runner.device
    rows = torch.arange(width, dtype=torch.int32, device=device)
    sources = torch.zeros(width, runner.cache_len, dtype=torch.int32, device=device)
    logits = _run_prompt(runner, prompt)
    beams, times, gone = Beams(), [], False
    for position in range(len(prompt), len(prompt) + search.max_new_tokens):
        if runner.group.rank == 0:
            beams = advance(search, beams, best_continuations(search, beams, logits, name))
            gone = cancelled()
        done, parents, tokens = _broadcast_choice(runner, beams, gone)
        runner.check()
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
    """Prefill row 0; returns the logits after the prompt, [1, vocab_size]."""
    logits = torch.empty(0)
    for (piece,) in split_prompts([(0, 0, len(prompt))], runner.chunk, mixed=False):
        size = piece.end - piece.begin
        wanted = [size - 1] if piece.end == len(prompt) else []
        tokens = prompt[piece.begin : piece.end]
        logits = extend(runner, tokens, range(piece.begin, piece.end), [0] * size, wanted)
    return logits


def best_continuations(
    search: Search, beams: Beams, logits: Tensor, name: str = "a text"
) -> list[Candidate]:
    """Returns the most probable continuations, `search.num_candidates` at most, without impossible ones
    (probability 0). Row i of `logits`, float32 [1 or W, V], follows running text i; further rows are
    ignored. Sums are float32, as in transformers. Raises InputError if the best is not finite."""
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


def _broadcast_choice(runner: Runner, beams: Beams, gone: bool) -> tuple[bool, list[int], list[int]]:
    """Broadcast rank 0's decision: whether the search is over, and each slot's parent beam and token.
    Slots without a beam repeat the first beam, and their results are not used."""
    width = runner.num_rows
    said = [0] * (1 + 2 * width)
    if runner.group.rank == 0:
        said[0] = beams.done or gone
        spare = width - len(beams.running)
        running = [*beams.running, *beams.running[:1] * spare]
        if running:
            said[1:] = [*(beam.parent for beam in running), *(beam.tokens[-1] for beam in running)]
    sent = torch.tensor(said, dtype=torch.int64, device=runner.device)
    said = ops.broadcast(sent, 0, runner.group).tolist()
    return bool(said[0]), said[1 : 1 + width], said[1 + width :]
