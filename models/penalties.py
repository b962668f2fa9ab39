"""Logit bias and penalties of a request.

They concern few of a vocabulary's tokens. So a request keeps a table of these: the tokens of its bias,
its prompt and its answer, one slot each, in the order of first use. A step changes only their logits,
and a request without bias and penalties has no table. The order is that of transformers and vLLM: bias,
then repetition penalty, then presence and frequency penalties.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.sampling_params import Sampling


@dataclass(frozen=True)
class Table:
    """Tensors [capacity]; the first `len(slots)` elements are in use. They are changed in place.

    The capacity is the vocabulary size, so a table never grows. Memory that is never written occupies
    no pages.
    """

    sampling: Sampling
    slots: dict[int, int]  # token -> slot
    counts: list[int]  # how often the token occurs in the answer
    tokens: Tensor  # int64
    bias: Tensor  # float32, added to the logit
    factor: Tensor  # float32, divides logits of at least 0 and multiplies those below 0
    penalty: Tensor  # float32, subtracted last


def make_table(
    sampling: Sampling, prompt: Sequence[int], vocab_size: int, device: torch.device
) -> Table | None:
    """The table of a request at its start; None if the request changes no logits.

    Prompt tokens beyond the vocabulary (where the embedding is larger than the head) cannot be chosen,
    and are left out.
    """
    if not sampling.penalizes and not sampling.logit_bias:
        return None
    bias = dict(sampling.logit_bias)
    repeated = sampling.repetition_penalty != 1.0
    seen = {token for token in prompt if token < vocab_size} if repeated else set()
    listed = [*bias, *(seen - bias.keys())]
    used = len(listed)
    tokens = torch.empty(vocab_size, dtype=torch.int64, device=device)
    columns = [torch.empty(vocab_size, device=device) for _ in range(3)]
    tokens[:used] = torch.tensor(listed, dtype=torch.int64)
    columns[0][:used] = torch.tensor([bias.get(token, 0.0) for token in listed])
    factors = [sampling.repetition_penalty if token in seen else 1.0 for token in listed]
    columns[1][:used] = torch.tensor(factors)
    columns[2][:used] = 0.0
    slots = {token: slot for slot, token in enumerate(listed)}
    return Table(sampling, slots, [0] * used, tokens, *columns)


def record(table: Table, tokens: Iterable[int]) -> None:
    """Add tokens of the answer to the counts and penalties."""
    sampling = table.sampling
    if not sampling.penalizes:
        return
    for token in tokens:
        slot = table.slots.setdefault(token, len(table.slots))
        if slot == len(table.counts):
            table.counts.append(0)
            table.tokens[slot] = token
            table.bias[slot] = 0.0
        table.counts[slot] += 1
        table.factor[slot] = sampling.repetition_penalty
        # Computed from the count each time: a running sum would accumulate rounding errors.
        frequency = sampling.frequency_penalty * table.counts[slot]
        table.penalty[slot] = sampling.presence_penalty + frequency


def adjust(table: Table, logits: Tensor) -> None:
    """Apply bias and penalties to logits, float32 [V], in place."""
    used = len(table.slots)
    tokens, factor = table.tokens[:used], table.factor[:used]
    x = logits[tokens] + table.bias[:used]
    x = torch.where(x < 0, x * factor, x / factor)
    logits[tokens] = x - table.penalty[:used]


def copied(table: Table) -> Table:
    """A copy of the table, to record draft tokens that may still be rejected."""
    used = len(table.slots)
    columns = [table.tokens, table.bias, table.factor, table.penalty]
    copies = [torch.empty_like(column) for column in columns]
    for copy, column in zip(copies, columns, strict=True):
        copy[:used] = column[:used]
    return Table(table.sampling, dict(table.slots), list(table.counts), *copies)
