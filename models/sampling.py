"""From logits to tokens, for a batch whose rows are requests of different wishes. Rank 0 alone samples.

In order: bias and penalties on the model's logits (`penalties`), temperature, top_k, top_p, min_p
(`limits`), as in transformers; then one draw. Log-probabilities that are reported are those of the
model: before bias, penalties and temperature (vLLM's "raw"). Equal logits resolve to the lowest token.

A draw is the inverse of the cumulative distribution, tokens ascending, at one number that is a function
of the request's seed and the number of tokens it has (`philox`). So a row's token depends on its own
seed, count, logits and parameters alone: not on the row, the batch, the ranks or the threads. The
alternative, a Gumbel number per token and the argmax, needs no sum, but 128,256 random numbers for a
token of Llama 3: 2.6 ms where the sum takes 0.1 ms. The sum is torch.cumsum in double precision, which
adds in one order; its last bits matter only to a number that lies within 1e-12 of a boundary.

Not here: the draws of speculative sampling, which start from `distribution`; stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import InputError
from models import penalties
from models.limits import likeliest, weights
from models.penalties import Table, make_table
from models.philox import uniform, uniforms
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
    "uniforms",
]

CHOICE_STREAM = 0  # of the numbers that `choose` draws with; others are free for others


@dataclass(frozen=True)
class Sampler:
    """The requests of R rows; `start_row` and `choose` change it in place."""

    vocab_size: int
    rows: list[Sampling]
    tables: list[Table | None]  # None: no bias, no penalties
    names: list[str]  # of the requests, for errors
    seed: Tensor  # int64 [R], as in `rows`: for `uniforms`


@dataclass(frozen=True)
class Choice:
    """What was chosen, row by row. Of an inactive row nothing here means anything.

    The log-probabilities are None unless an active row asks for them; n is the most that one asks for,
    and all rows that ask get n, likeliest first. Rows that do not ask hold NaN, and -1 for tokens.
    """

    tokens: Tensor  # int64 [R]
    logprobs: Tensor | None = None  # float32 [R]
    top_tokens: Tensor | None = None  # int64 [R, n]
    top_logprobs: Tensor | None = None  # float32 [R, n]


def make_sampler(num_rows: int, vocab_size: int, device: torch.device | str = "cpu") -> Sampler:
    """All rows greedy until `start_row`."""
    seed = torch.zeros(num_rows, dtype=torch.int64, device=device)
    names = [f"row {row}" for row in range(num_rows)]
    return Sampler(vocab_size, [Sampling()] * num_rows, [None] * num_rows, names, seed)


def start_row(
    sampler: Sampler, row: int, sampling: Sampling, prompt: Sequence[int], name: str = ""
) -> None:
    """A new request in this row. `sampling` has passed `check_sampling` for this vocabulary; `name` is
    what errors call the request."""
    sampler.names[row] = name or f"row {row}"
    sampler.rows[row] = sampling
    sampler.tables[row] = make_table(sampling, prompt, sampler.vocab_size, sampler.seed.device)
    sampler.seed[row] = sampling.seed


def choose(sampler: Sampler, logits: Tensor, made: Tensor, active: Tensor | None = None) -> Choice:
    """The next token of each active row (bool [R]; None: all), recorded for its penalties.

    logits float32 [R, V]; made int64 [R], how many tokens each row's answer has so far. Raises
    InputError if an active row's largest logit is not a finite number, before anything is recorded.
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
    """Count tokens of a row's answer that `choose` did not choose (drafts that were accepted)."""
    table = sampler.tables[row]
    if table is not None:
        penalties.record(table, tokens)


def distribution(
    sampler: Sampler, logits: Tensor, drafts: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """What `choose` draws from: float32 [R, V] or [R, T, V] -> probabilities of the same shape.

    A greedy row has one 1, an inactive row zeros. With T > 1 positions, `drafts` int64 [R, >= T - 1]
    are the tokens that would be recorded between them; rows with penalties cannot do without. Nothing
    is recorded. Raises InputError as `choose` does.
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

    The weights need not sum to 1. The index is the first whose cumulative weight lies above `at` times
    the sum, so a weight of 0 is never taken; and there is one, for `at` is at most 1 - 2^-53, and so
    its product with the sum rounds to less than the sum.
    """
    mass = weight.cumsum(dim=0, dtype=torch.float64)
    return torch.searchsorted(mass, mass[-1] * at, right=True)


def _live(sampler: Sampler, active: Tensor | None) -> list[int]:
    rows = range(len(sampler.rows))
    if active is None:
        return list(rows)
    return [row for row, on in zip(rows, active.tolist(), strict=True) if on]


def _adjusted(sampler: Sampler, logits: Tensor, live: list[int]) -> Tensor:
    """With bias and penalties; the same tensor if no row has any."""
    tables = [(row, table) for row in live if (table := sampler.tables[row]) is not None]
    adjusted = logits.clone() if tables else logits
    for row, table in tables:
        penalties.adjust(table, adjusted[row])
    return adjusted


def not_finite(value: float, where: str) -> InputError:
    """The error for a largest logit of which nothing can follow."""
    return InputError(
        f"the largest logit of {where} is {value}, not a finite number: the weights are damaged, or "
        "the model's sums overflow its dtype; try dtype=float32, or another copy"
    )


def _check_finite(sampler: Sampler, best: Tensor, live: list[int]) -> None:
    """A maximum is NaN if one element is: so it is all that must be looked at."""
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
        top_tokens[row] = likeliest(logits[row], count)
        top[row] = logprobs[top_tokens[row]]
    return Choice(tokens, chosen, top_tokens, top)
