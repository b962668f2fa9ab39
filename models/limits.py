"""One row of logits -> the tokens that a draw may take, with their weights.

The order is that of transformers: temperature, top_k, top_p, min_p. Sorting a vocabulary takes longer
than all else, so limits look at a few hundred candidates first, and at more only if those do not hold
what the limits let through. One row at a time: temporaries of a row stay in the caches (eight rows of
128,256 tokens take half the time one by one), and nothing of a row can depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.sampling_params import Sampling

CANDIDATES = 256
# Quotients by less would leave float32; such a temperature is as good as greedy, but for equal logits.
MIN_TEMPERATURE = 1e-30


def weights(logits: Tensor, best: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """float32 [V] and its maximum, finite -> weights float32 [n], their tokens int64 [n], ascending.

    None for the tokens means all of them. The weights are the softmax after temperature, or what the
    limits leave of it: they need not sum to 1, and some may be 0.

    top_k: the k likeliest. top_p: of those, the smallest set of the likeliest that holds so much of
    their probability (Holtzman et al., 2019). Both cut equal logits at the lowest tokens, where
    transformers' top_k keeps all that equal the last. min_p: of those, the ones that have at least so
    much of the likeliest's probability (Nguyen et al., 2024). The likeliest token always remains.
    """
    # The maximum goes first: huge logits over a small temperature would overflow.
    p = ((logits - best) / max(sampling.temperature, MIN_TEMPERATURE)).softmax(dim=-1)
    tokens = None
    top_k = sampling.top_k if sampling.top_k < len(logits) else 0
    if top_k > 0 or sampling.top_p < 1.0:
        tokens = _within(logits, p, top_k, sampling.top_p)
        p = p[tokens]
    if sampling.min_p > 0.0:
        p = p.masked_fill(p < sampling.min_p * p.max(), 0.0)
    return p, tokens


def likeliest(logits: Tensor, count: int) -> Tensor:
    """float32 [V] -> the `count` likeliest tokens, int64; equal logits in the order of tokens."""
    values, tokens = _candidates(logits, max(CANDIDATES // 4, count + 1))
    if count > 0 and len(values) < len(logits) and not bool(values[count - 1] > values[-1]):
        tokens = logits.sort(descending=True, stable=True).indices
    return tokens[:count]


def _within(logits: Tensor, p: Tensor, top_k: int, top_p: float) -> Tensor:
    """The tokens that top_k (0: no limit) and top_p let through, ascending."""
    values, tokens = _candidates(logits, max(CANDIDATES, top_k + 1))
    kept = _kept(p[tokens], top_k, top_p)
    if len(values) < len(logits) and not (kept <= len(values) and bool(values[kept - 1] > values[-1])):
        if top_k > 0:
            tokens = logits.sort(descending=True, stable=True).indices
        else:
            # The rest is too unlikely to hold 1 - top_p together: often most of the vocabulary.
            tokens = (p >= (1.0 - top_p) / len(p)).nonzero().squeeze(1)
            tokens = tokens[logits[tokens].sort(descending=True, stable=True).indices]
        kept = _kept(p[tokens], top_k, top_p)
    return tokens[:kept].sort().values


def _kept(p: Tensor, top_k: int, top_p: float) -> int:
    """How many of these probabilities, in descending order, remain; one more than all if too few."""
    if top_p == 1.0:
        return top_k
    # In double precision and in one order: the same for any number of threads.
    mass = p.cumsum(dim=0, dtype=torch.float64)
    total = mass[top_k - 1] if top_k > 0 else torch.ones_like(mass[0])
    return int(torch.searchsorted(mass, top_p * total)) + 1


def _candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits and their tokens, equal ones in the order of tokens.

    Of the tokens that equal the last, torch.topk takes any: only what lies above it is sure.
    """
    if count >= len(logits):
        return logits.sort(descending=True, stable=True)
    values, tokens = logits.topk(count)
    tokens, order = tokens.sort()
    values, order = values[order].sort(descending=True, stable=True)
    return values, tokens[order]
