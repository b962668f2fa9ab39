"""The loop: prompts into rows, tokens for all rows at once, and a look at them every few steps.

Each rank runs this loop on the same requests and plans the same steps. Whether a row has ended is known
on the device after each step, and such a row stands still; the ranks look only every `check_every`
steps, when rank 0 tells what it found (stop strings are found in text, which it alone has) and rows go
to the next requests. So no step waits for a look, and what was made past an end is cut off.

What is not here: beams (`engine.beams`), guessed tokens (`engine.speculation`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comm import ops
from engine.requests import Answer, Logprobs, Request, pack
from engine.steps import DECODE, GREEDY, Runner, extend
from models.sampling import Choice, Sampler, choose, make_sampler, start_row

CHECK_EVERY = 8  # steps between two looks; PyTorch/XLA's Llama 2 looked every 10


@dataclass(frozen=True)
class Watcher:
    """What rank 0 does with tokens as they are made. `on_token(request, token)`: true where the text
    ends with it (a stop string). `cancelled()`: the requests that nobody waits for any more."""

    on_token: Callable[[int, int], bool] = lambda request, token: False
    cancelled: Callable[[], set[int]] = set
    on_end: Callable[[int, Answer], None] = lambda request, answer: None


@dataclass(frozen=True)
class Rows:
    """The rows on the device, int64 [R] but for `done`: the token to be fed next and its position;
    where the prompt ended; the position at which the answer is long enough; whether the row stands
    still. `stops`: tokens that end a text."""

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    ends: Tensor
    done: Tensor
    stops: Tensor


@dataclass
class Work:
    """A row's request as the host knows it. `made` is current as of the last look; tokens and times are
    kept on rank 0."""

    request: int
    prompt: tuple[int, ...]
    max_new_tokens: int
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
    """Continue every request's prompt; answers in order (complete on rank 0 alone).

    All ranks pass the same requests and stop tokens, which must fit (`check_request`); `watcher`
    matters on rank 0. A row's tokens do not depend on what other rows hold.
    """
    watcher = watcher or Watcher()
    loop = _open(runner, requests, stop_tokens, watcher)
    waiting = deque(enumerate(requests))
    answers: dict[int, Answer] = {}
    while waiting or any(loop.works):
        _admit(loop, waiting)
        _look(loop, answers)
        left = [work.max_new_tokens - work.made for work in loop.works if work is not None]
        if not left:
            continue
        for _ in range(min(check_every, max(left))):
            _advance(loop)
        _look(loop, answers)
    return [answers[i] for i in range(len(requests))]


@dataclass(frozen=True)
class Loop:
    """What a call of `generate` works with. `mail`: results that the device may still be computing, as
    (event, tokens, done before, choice)."""

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
        stops=torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=device),
    )
    plain = all(request.sampling.is_plain for request in requests)
    sampler = None if plain else make_sampler(count, runner.vocab_size)
    works: list[Work | None] = [None] * count
    return Loop(
        runner, requests, stop_tokens, watcher, works, rows, sampler, deque(), time.perf_counter()
    )


def _admit(loop: Loop, waiting: deque[tuple[int, Request]]) -> None:
    """Give free rows to waiting requests, run their prompts and choose their first tokens."""
    runner, rows = loop.runner, loop.rows
    new: list[tuple[int, int, int]] = []
    for row, work in enumerate(loop.works):
        if work is not None or not waiting:
            continue
        index, request = waiting.popleft()
        loop.works[row] = Work(index, request.prompt, request.max_new_tokens)
        if loop.sampler is not None:
            start_row(loop.sampler, row, request.sampling, request.prompt)
        length = len(request.prompt)
        # The last token is run again in any case: its logits are wanted.
        new.append((row, min(request.cached, length - 1), length))
    if not new:
        return
    logits = torch.zeros(runner.num_rows, runner.vocab_size, device=runner.device)
    for call in pack(new, runner.chunk, runner.mixed):
        tokens: list[int] = []
        positions: list[int] = []
        owners, wanted, ended = [], [], []
        for piece in call:
            prompt = _prompt(loop, piece.row)
            tokens += prompt[piece.begin : piece.end]
            positions += range(piece.begin, piece.end)
            owners += [piece.row] * (piece.end - piece.begin)
            if piece.end == len(prompt):
                wanted.append(len(tokens) - 1)
                ended.append(piece.row)
        found = extend(runner, tokens, positions, owners, wanted)
        if ended:
            logits[ended] = found
    fresh = torch.zeros(runner.num_rows, dtype=torch.bool)
    for row, _, length in new:
        fresh[row] = True
        work = loop.works[row]
        assert work is not None
        rows.starts[row] = length
        rows.positions[row] = length
        rows.ends[row] = length + work.max_new_tokens - 1
    fresh = fresh.to(runner.device)
    tokens_, choice = _choose(loop, logits, fresh)
    rows.tokens.copy_(torch.where(fresh, tokens_, rows.tokens))
    over = torch.isin(rows.tokens, rows.stops) | (rows.positions >= rows.ends)
    _post(loop, rows.tokens.clone(), ~fresh, choice)
    rows.done.copy_(torch.where(fresh, over, rows.done))


def _prompt(loop: Loop, row: int) -> tuple[int, ...]:
    work = loop.works[row]
    assert work is not None
    return work.prompt


def _choose(loop: Loop, logits: Tensor, active: Tensor) -> tuple[Tensor, Choice | None]:
    """The next token of each row. Draws are rank 0's, who tells the others: it alone has to be right
    about a sum of floats."""
    if loop.sampler is None:
        return logits.argmax(-1), None  # the lowest of equal ones, on every rank
    rows, choice = loop.rows, None
    tokens = torch.zeros_like(rows.tokens)
    if loop.runner.group.rank == 0:
        made = (rows.positions - rows.starts).cpu()
        choice = choose(loop.sampler, logits.cpu(), made, active.cpu())
        tokens = choice.tokens.to(rows.tokens.device)
    return ops.broadcast(tokens, 0, loop.runner.group), choice


def _advance(loop: Loop) -> None:
    """One token for every row that does not stand still."""
    rows, choice = loop.rows, None
    before = rows.done.clone()
    if loop.sampler is None:
        tokens = loop.runner.steps[GREEDY](rows.tokens, rows.positions)
        rows.positions.add_(~before)
    else:
        logits = loop.runner.steps[DECODE](rows.tokens, rows.positions)
        rows.positions.add_(~before)
        tokens, choice = _choose(loop, logits, ~before)
    rows.tokens.copy_(torch.where(before, rows.tokens, tokens))
    rows.done.logical_or_(torch.isin(rows.tokens, rows.stops) | (rows.positions >= rows.ends))
    _post(loop, rows.tokens.clone(), before, choice)


def _post(loop: Loop, tokens: Tensor, before: Tensor, choice: Choice | None) -> None:
    """Note what a step made, and read what the device has finished, without waiting for it."""
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
    """Take in the oldest step's tokens: keep those before the end of each row, and show them."""
    event, tokens, before, choice = loop.mail.popleft()
    if event is not None:
        event.synchronize()
    now = time.perf_counter()
    for row, (token, was_done) in enumerate(zip(tokens.tolist(), before.tolist(), strict=True)):
        work = loop.works[row]
        if was_done or work is None or work.finish:
            continue
        work.times.append(now)
        if token in loop.stop_tokens:
            work.finish = "stop"
            continue
        work.tokens.append(token)
        if choice is not None and loop.requests[work.request].sampling.logprobs >= 0:
            work.logprobs.append(_logprobs(choice, row, loop.requests[work.request].sampling.logprobs))
        if loop.watcher.on_token(work.request, token):
            work.finish = "stop"
        elif len(work.tokens) == work.max_new_tokens:
            work.finish = "length"


def _logprobs(choice: Choice, row: int, count: int) -> Logprobs:
    assert choice.logprobs is not None
    assert choice.top_tokens is not None
    assert choice.top_logprobs is not None
    top = choice.top_tokens[row, :count].tolist(), choice.top_logprobs[row, :count].tolist()
    return Logprobs(float(choice.logprobs[row]), tuple(top[0]), tuple(top[1]))


def _look(loop: Loop, answers: dict[int, Answer]) -> None:
    """All ranks learn from rank 0 how far each row is and whether it has ended; ended ones are free."""
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
            answers[work.request] = _answer(work, loop.start)
            if group.rank == 0:
                loop.watcher.on_end(work.request, answers[work.request])
            loop.works[row] = None
            rows.done[row] = True


def _answer(work: Work, start: float) -> Answer:
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
