"""From logits to tokens, for a batch of requests with different sampling parameters, one request per
row. In the engine, only rank 0 samples.

The order is that of transformers: bias and penalties on the model's logits (`penalties`); temperature,
top_k, top_p, min_p (`limits`); then one draw. Reported log-probabilities are those of the model: before
bias, penalties and temperature (vLLM's "raw"). Ties resolve to the lowest token.

A draw inverts the cumulative distribution, with tokens ascending, at one random number. That number is
a function of the request's seed and the number of its tokens (`philox`). So a row's token depends only
on its own seed, count, logits and parameters: not on the row, the batch, the ranks or the threads. The
alternative, one Gumbel number per token and the argmax, needs no sum, but 128,256 random numbers for a
token of Llama 3: 2.6 ms, while the sum takes 0.1 ms. The sum is torch.cumsum in double precision, which
adds in a fixed order; its last bits matter only if the number is within 1e-12 of a boundary.

What is not here: the draws of speculative decoding, which start from `distribution`; stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import InputError
from models import penalties
from models.limits import largest, weights
from models.penalties import Table, make_table
from models.philox import uniform
from models.sampling_params import Sampling, check_sampling

__all__ = [
    "CHOICE_STREAM",
    "Choice",
    "Sampler",
    "Sampling",
    "check_sampling",
    "choose",
    "distribution",
    "draw",
    "make_sampler",
    "record",
    "start_row",
]

CHOICE_STREAM = 0  # the `philox` stream of `choose`; other draws use other streams


@dataclass(frozen=True)
class Sampler:
    """The requests of R rows; `start_row` and `choose` change it in place."""

    vocab_size: int
    rows: list[Sampling]
    tables: list[Table | None]  # None: no bias, no penalties
    names: list[str]  # of the requests, for errors
    seed: Tensor  # int64 [R], the seeds of `rows`, for `uniform`


@dataclass(frozen=True)
class Choice:
    """The chosen tokens, one per row. The values of inactive rows are meaningless.

    The log-probabilities are None unless an active row asks for them. n is the largest number that a
    row asks for; all rows that ask get n, most probable first. Rows that do not ask hold NaN, and -1 as
    tokens.
    """

    tokens: Tensor  # int64 [R]
    logprobs: Tensor | None = None  # float32 [R]
    top_tokens: Tensor | None = None  # int64 [R, n]
    top_logprobs: Tensor | None = None  # float32 [R, n]


def make_sampler(num_rows: int, vocab_size: int, device: torch.device | str = "cpu") -> Sampler:
    """A sampler whose rows are all greedy until `start_row`."""
    seed = torch.zeros(num_rows, dtype=torch.int64, device=device)
    names = [f"row {row}" for row in range(num_rows)]
    return Sampler(vocab_size, [Sampling()] * num_rows, [None] * num_rows, names, seed)


def start_row(
    sampler: Sampler, row: int, sampling: Sampling, prompt: Sequence[int], name: str = ""
) -> None:
    """Start a new request in this row. `sampling` must have passed `check_sampling` for this
    vocabulary; `name` names the request in errors."""
    sampler.names[row] = name or f"row {row}"
    sampler.rows[row] = sampling
    sampler.tables[row] = make_table(sampling, prompt, sampler.vocab_size, sampler.seed.device)
    sampler.seed[row] = sampling.seed


def choose(sampler: Sampler, logits: Tensor, made: Tensor, active: Tensor | None = None) -> Choice:
    """The next token of each active row; it is recorded for the row's penalties.

    logits float32 [R, V]; made int64 [R], the number of tokens in each row's answer so far; active bool
    [R] (None: all rows). Raises InputError if an active row's largest logit is not a finite number,
    before anything is recorded.
    """
    live = _live(sampler, active)
    adjusted = _adjusted(sampler, logits, live)
    best, tokens = adjusted.max(dim=-1)
    _check_finite(sampler, best, live)
    drawn = [row for row in live if sampler.rows[row].temperature > 0.0]
    if drawn:
        counts = made.tolist()
        for row in drawn:
            sampling = sampler.rows[row]
            (at,) = uniform(sampling.seed, counts[row], CHOICE_STREAM, 1)
            weight, support = weights(adjusted[row], best[row], sampling)
            place = draw(weight, at)
            tokens[row] = place if support is None else support[place]
    for row in live:
        if sampler.tables[row] is not None:
            record(sampler, row, [int(tokens[row])])
    return _with_logprobs(sampler, logits, tokens, live)


def record(sampler: Sampler, row: int, tokens: Sequence[int]) -> None:
    """Count tokens of a row's answer that `choose` did not choose (accepted draft tokens)."""
    table = sampler.tables[row]
    if table is not None:
        penalties.record(table, tokens)


def distribution(
    sampler: Sampler, logits: Tensor, drafts: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """The distribution that `choose` draws from: logits float32 [R, V] or [R, T, V] -> probabilities
    of the same shape.

    A greedy row is one-hot, an inactive row is zero. With T > 1 positions, `drafts` int64 [R, >= T - 1]
    are the draft tokens between them; rows with penalties need them (ValueError without). Nothing is
    recorded. Raises InputError as `choose` does.
    """
    if logits.dim() == 2:
        return distribution(sampler, logits.unsqueeze(1), drafts, active).squeeze(1)
    live, steps = _live(sampler, active), logits.shape[1]
    adjusted = logits.clone()
    for row in live:
        table = sampler.tables[row]
        if table is None:
            continue
        if steps > 1 and table.sampling.penalizes:
            if drafts is None:
                raise ValueError("a row with penalties needs the drafts between its positions")
            table = penalties.copied(table)
        for step in range(steps):
            penalties.adjust(table, adjusted[row, step])
            if step < steps - 1 and drafts is not None:
                penalties.record(table, [int(drafts[row, step])])
    best, tokens = adjusted.max(dim=-1)
    _check_finite(sampler, best, live)
    result = torch.zeros_like(adjusted)
    for row in live:
        sampling = sampler.rows[row]
        for step in range(steps):
            target = result[row, step]
            if sampling.temperature == 0.0:
                target[tokens[row, step]] = 1.0
                continue
            weight, support = weights(adjusted[row, step], best[row, step], sampling)
            weight = weight / weight.cumsum(dim=0, dtype=torch.float64)[-1]
            target[slice(None) if support is None else support] = weight.float()
    return result


def draw(weight: Tensor, at: float) -> Tensor:
    """Inverse of the cumulative distribution: weights >= 0, float [n], at in (0, 1) -> index, int64 [].

    The weights need not sum to 1. The index is the first whose cumulative weight is above `at` times
    the sum, so a weight of 0 is never taken. Such an index exists: `at` is at most 1 - 2^-53, so `at`
    times the sum rounds to less than the sum.
    """
    mass = weight.cumsum(dim=0, dtype=torch.float64)
    return torch.searchsorted(mass, mass[-1] * at, right=True)


def _live(sampler: Sampler, active: Tensor | None) -> list[int]:
    rows = range(len(sampler.rows))
    if active is None:
        return list(rows)
    return [row for row, on in zip(rows, active.tolist(), strict=True) if on]


def _adjusted(sampler: Sampler, logits: Tensor, live: list[int]) -> Tensor:
    """The logits with bias and penalties applied; the same tensor if no row has any."""
    tables = [(row, table) for row in live if (table := sampler.tables[row]) is not None]
    adjusted = logits.clone() if tables else logits
    for row, table in tables:
        penalties.adjust(table, adjusted[row])
    return adjusted


def not_finite(value: float, where: str) -> InputError:
    """The error for a largest logit that is not a finite number; `where` names its origin."""
    return InputError(
        f"the largest logit of {where} is {value}, not a finite number: the weights are damaged, or "
        "the model's sums overflow its dtype; try dtype=float32, or another copy"
    )


def _check_finite(sampler: Sampler, best: Tensor, live: list[int]) -> None:
    """Raise InputError if the largest logit of a live row is not finite. A maximum is NaN if any
    element is, so checking the maxima is enough."""
    finite = best.isfinite()
    if bool(finite.all()):
        return
    bad = [row for row in live if not bool(finite[row].all())]
    if bad:
        value = best[bad[0]].flatten()[~finite[bad[0]].flatten()][0].item()
        raise not_finite(value, sampler.names[bad[0]])


def _with_logprobs(sampler: Sampler, logits: Tensor, tokens: Tensor, live: list[int]) -> Choice:
    asked = [row for row in live if sampler.rows[row].logprobs >= 0]
    if not asked:
        return Choice(tokens)
    count = min(max(sampler.rows[row].logprobs for row in asked), logits.shape[1])
    chosen = torch.full(tokens.shape, torch.nan, device=logits.device)
    top_tokens = torch.full((len(tokens), count), -1, device=logits.device)
    top = torch.full((len(tokens), count), torch.nan, device=logits.device)
    for row in asked:
        logprobs = logits[row].log_softmax(dim=-1)
        chosen[row] = logprobs[tokens[row]]
        top_tokens[row] = largest(logits[row], count)
        top[row] = logprobs[top_tokens[row]]
    return Choice(tokens, chosen, top_tokens, top)
