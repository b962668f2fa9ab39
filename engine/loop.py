"""The decoding loop: admits requests to cache slots, decodes all slots at once, checks every few steps.

Every rank runs this loop on the same requests and plans the same steps. After each step the device
knows which slots are done, and these no longer advance. The ranks synchronize only every `check_every`
steps: then rank 0 broadcasts which sequences have ended (it alone has the text, in which stop strings
are found), and free slots go to the next requests. So no step waits for a check, and tokens behind an
end are cut off.

Not here: beams (`engine.beams`), draft tokens (`engine.speculation`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comm import ops
from engine.requests import Answer, Logprobs, Request
from engine.steps import DECODE, GREEDY, Runner, Span, extend_rows
from models.sampling import Choice, Sampler, choose, make_sampler, not_finite, start_row

CHECK_EVERY = 8  # steps between two checks; PyTorch/XLA's Llama 2 checked every 10


@dataclass(frozen=True)
class Watcher:
    """Callbacks on rank 0. `on_token(request, token)` is called for each token; it returns True if the
    text ends with it (a stop string). `cancelled()` returns the requests that were cancelled.
    `on_end(request, answer)` is called when an answer is complete."""

    on_token: Callable[[int, int], bool] = lambda request, token: False
    cancelled: Callable[[], set[int]] = set
    on_end: Callable[[int, Answer], None] = lambda request, answer: None


@dataclass(frozen=True)
class Rows:
    """The state of the R slots, on the device; int64 [R], but `done` is bool [R].

    `tokens`, `positions`: the token to feed next and its position. `starts`: the prompt's length.
    `ends`: the position at which the answer has its maximum length. `done`: the slot no longer
    advances. `stops` [S]: tokens that end a text, and the values of `ops.argmax` for logits that are
    not finite."""

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    ends: Tensor
    done: Tensor
    stops: Tensor


@dataclass
class Work:
    """The request in a slot, as the host knows it; `name` is for errors. `made`: tokens generated as of
    the last check. Tokens, logprobs and times are filled on rank 0 only."""

    request: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    name: str
    made: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish: str = ""
    drafted: int = 0
    accepted: int = 0


@torch.no_grad()
def generate(
    runner: Runner,
    requests: Sequence[Request],
    stop_tokens: frozenset[int] = frozenset(),
    watcher: Watcher | None = None,
    check_every: int = CHECK_EVERY,
) -> list[Answer]:
    """Continue every request's prompt; returns the answers in order, complete on rank 0 only.

    All ranks pass the same requests, which must fit (`check_request`), and the same stop tokens.
    `watcher` is used on rank 0 only. A sequence's tokens do not depend on what other slots hold. Raises
    InputError where logits are not finite.
    """
    watcher = watcher or Watcher()
    loop = _open(runner, requests, stop_tokens, watcher)
    waiting = deque(enumerate(requests))
    answers: dict[int, Answer] = {}
    while waiting or any(loop.works):
        _admit(loop, waiting)
        _synchronize(loop, answers)
        runner.check()
        left = [work.max_new_tokens - work.made for work in loop.works if work is not None]
        if not left:
            continue
        for _ in range(min(check_every, max(left))):
            _advance(loop)
        _synchronize(loop, answers)
    return [answers[i] for i in range(len(requests))]


@dataclass(frozen=True)
class Loop:
    """The state of a call of `generate`. `mail`: results of steps that the device may still be
    computing, as (event, tokens, done before the step, choice)."""

    runner: Runner
    requests: Sequence[Request]
    stop_tokens: frozenset[int]
    watcher: Watcher
    works: list[Work | None]
    rows: Rows
    sampler: Sampler | None
    mail: deque[tuple[torch.cuda.Event | None, Tensor, Tensor, Choice | None]]
    start: float


def _open(
    runner: Runner, requests: Sequence[Request], stop_tokens: frozenset[int], watcher: Watcher
) -> Loop:
    count, device = runner.num_rows, runner.device
    zeros = torch.zeros(count, dtype=torch.int64, device=device)
    rows = Rows(
        tokens=zeros.clone(),
        positions=zeros.clone(),
        starts=zeros.clone(),
        ends=zeros.clone(),
        done=torch.ones(count, dtype=torch.bool, device=device),
        stops=torch.tensor([*ops.NO_CHOICE, *sorted(stop_tokens)], device=device),
    )
    plain = all(request.sampling.is_plain for request in requests)
    sampler = None if plain else make_sampler(count, runner.vocab_size)
    works: list[Work | None] = [None] * count
    return Loop(
        runner, requests, stop_tokens, watcher, works, rows, sampler, deque(), time.perf_counter()
    )


def _admit(loop: Loop, waiting: deque[tuple[int, Request]]) -> None:
    """Give free slots to waiting requests, run their prompts and choose their first tokens."""
    runner, rows = loop.runner, loop.rows
    new: list[Span] = []
    for row, work in enumerate(loop.works):
        if work is not None or not waiting:
            continue
        index, request = waiting.popleft()
        loop.works[row] = Work(index, request.prompt, request.max_new_tokens, request.name)
        if loop.sampler is not None:
            start_row(loop.sampler, row, request.sampling, request.prompt, request.name)
        begin = begin_of(request)
        new.append(Span(row, begin, request.prompt[begin:]))
        rows.starts[row] = rows.positions[row] = len(request.prompt)
        rows.ends[row] = len(request.prompt) + request.max_new_tokens - 1
    if not new:
        return
    places = [span.row for span in new]
    logits = torch.zeros(runner.num_rows, runner.vocab_size, device=runner.device)
    logits[places] = extend_rows(runner, new)
    fresh = torch.zeros(runner.num_rows, dtype=torch.bool, device=runner.device)
    fresh[places] = True
    tokens, choice = _choose(loop, logits, fresh)
    tokens = _feed(rows, tokens, ~fresh)
    over = torch.isin(tokens, rows.stops) | (rows.positions >= rows.ends)
    _post(loop, tokens, ~fresh, choice)
    rows.done.copy_(torch.where(fresh, over, rows.done))


def _feed(rows: Rows, tokens: Tensor, still: Tensor) -> Tensor:
    """Set the tokens to feed next, except in slots that are `still`; returns each slot's token. A
    negative token means that logits were not finite (`ops.argmax`). It is never fed: it ends its slot
    here, and `take` ends the run."""
    tokens = torch.where(still, rows.tokens, tokens)
    torch.clamp(tokens, min=0, out=rows.tokens)
    return tokens


def begin_of(request: Request) -> int:
    """Returns the index of the first prompt token that must be run. The last token always is run,
    because its logits are needed."""
    return min(request.cached, len(request.prompt) - 1)


def _choose(loop: Loop, logits: Tensor, active: Tensor) -> tuple[Tensor, Choice | None]:
    """The next token of each slot. Only rank 0 samples, and broadcasts the tokens: sums of floats could
    differ between ranks."""
    if loop.sampler is None:
        return ops.whole_argmax(logits), None  # on ties the lowest token id, on every rank
    rows, choice = loop.rows, None
    tokens = torch.zeros_like(rows.tokens)
    if loop.runner.group.rank == 0:
        made = (rows.positions - rows.starts).cpu()
        choice = choose(loop.sampler, logits.cpu(), made, active.cpu())
        tokens = choice.tokens.to(rows.tokens.device)
    return ops.broadcast(tokens, 0, loop.runner.group), choice


def _advance(loop: Loop) -> None:
    """Decode one token for every slot that is not done."""
    rows, choice = loop.rows, None
    before = rows.done.clone()
    if loop.sampler is None:
        tokens = loop.runner.steps[GREEDY](rows.tokens, rows.positions)
        rows.positions.add_(~before)
    else:
        logits = loop.runner.steps[DECODE](rows.tokens, rows.positions)
        rows.positions.add_(~before)
        tokens, choice = _choose(loop, logits, ~before)
    tokens = _feed(rows, tokens, before)
    rows.done.logical_or_(torch.isin(tokens, rows.stops) | (rows.positions >= rows.ends))
    _post(loop, tokens, before, choice)


def _post(loop: Loop, tokens: Tensor, before: Tensor, choice: Choice | None) -> None:
    """Queue a step's result, and read the results that the device has finished, without waiting."""
    if loop.runner.group.rank:
        return
    event = None
    if tokens.is_cuda:
        tokens, before = tokens.to("cpu", non_blocking=True), before.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    loop.mail.append((event, tokens, before, choice))
    while loop.mail and (loop.mail[0][0] is None or loop.mail[0][0].query()):
        _read(loop)


def _read(loop: Loop) -> None:
    """Take in the tokens of the oldest queued step, except for sequences that ended before."""
    event, tokens, before, choice = loop.mail.popleft()
    if event is not None:
        event.synchronize()
    now = time.perf_counter()
    for row, (token, was_done) in enumerate(zip(tokens.tolist(), before.tolist(), strict=True)):
        work = loop.works[row]
        if was_done or work is None or work.finish:
            continue
        found = logprobs_of(choice, row, loop.requests[work.request])
        take(work, token, now, loop.stop_tokens, loop.watcher, found)


def take(
    work: Work,
    token: int,
    now: float,
    stop_tokens: frozenset[int],
    watcher: Watcher,
    logprobs: Logprobs | None,
) -> None:
    """Append a sequence's next token, on rank 0, and show it; sets `work.finish` if the text ends here.

    Raises InputError for a negative token: `ops.argmax` returns one where logits are not finite. It
    travels like a token, so nothing that follows from it is ever shown."""
    if token < 0:
        raise not_finite(ops.value_of(token), f"{work.name}, after {len(work.tokens)} tokens,")
    work.times.append(now)
    if token in stop_tokens:
        work.finish = "stop"
        return
    work.tokens.append(token)
    if logprobs is not None:
        work.logprobs.append(logprobs)
    if watcher.on_token(work.request, token):
        work.finish = "stop"
    elif len(work.tokens) == work.max_new_tokens:
        work.finish = "length"


def logprobs_of(choice: Choice | None, row: int, request: Request) -> Logprobs | None:
    """Returns the log-probabilities that the request asks for, of the token chosen in slot `row`; None
    if it asks for none."""
    count = request.sampling.logprobs
    if choice is None or count < 0:
        return None
    assert choice.logprobs is not None
    assert choice.top_tokens is not None
    assert choice.top_logprobs is not None
    top = choice.top_tokens[row, :count].tolist(), choice.top_logprobs[row, :count].tolist()
    return Logprobs(float(choice.logprobs[row]), tuple(top[0]), tuple(top[1]))


def _synchronize(loop: Loop, answers: dict[int, Answer]) -> None:
    """Synchronize: rank 0 broadcasts each slot's number of tokens and whether it has ended. Ended slots
    become free."""
    group, rows = loop.runner.group, loop.rows
    state = torch.zeros(2, loop.runner.num_rows, dtype=torch.int64)
    if group.rank == 0:
        while loop.mail:
            _read(loop)
        gone = loop.watcher.cancelled()
        for row, work in enumerate(loop.works):
            if work is not None:
                if work.request in gone and not work.finish:
                    work.finish = "cancelled"
                state[0, row] = len(work.times)
                state[1, row] = bool(work.finish)
    made, ended = ops.broadcast(state.to(loop.runner.device), 0, group).tolist()
    for row, work in enumerate(loop.works):
        if work is None:
            continue
        work.made = made[row]
        if ended[row]:
            answers[work.request] = answer_of(work, loop.start)
            if group.rank == 0:
                loop.watcher.on_end(work.request, answers[work.request])
            loop.works[row] = None
            rows.done[row] = True


def answer_of(work: Work, start: float) -> Answer:
    """Returns the answer to a slot's request. `start`: when the call began (`time.perf_counter`)."""
    times = work.times or [start]
    steps = len(times) - 1
    return Answer(
        tokens=tuple(work.tokens),
        finish=work.finish,
        ttft_s=times[0] - start,
        tpot_s=(times[-1] - times[0]) / steps if steps else 0.0,
        logprobs=tuple(work.logprobs),
        drafted=work.drafted,
        accepted=work.accepted,
    )
