"""One row of logits -> the tokens that sampling may draw, with their weights.

The order is that of transformers: temperature, top_k, top_p, min_p. Sorting a vocabulary takes longer
than everything else. So the limits are first applied to a few hundred candidates, and to more only if
these do not include all tokens within the limits. Rows are handled one by one: a row's temporaries stay
in the CPU caches (eight rows of 128,256 tokens take half the time that way), and no row can depend on
the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.sampling_params import Sampling

CANDIDATES = 256
# Division by a smaller temperature would overflow float32. At this one, sampling is greedy up to ties.
MIN_TEMPERATURE = 1e-30


def weights(logits: Tensor, best: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """logits float32 [V], best: their maximum, finite -> (weights float32 [n], tokens int64 [n],
    ascending).

    None for the tokens means the whole vocabulary. The weights are the softmax after temperature,
    restricted by the limits: they need not sum to 1, and some may be 0.

    top_k keeps the k most probable tokens. top_p keeps the smallest set of the most probable of these
    that holds at least the fraction top_p of their probability (Holtzman et al., 2019). Both break ties
    in favor of the lowest tokens, while transformers' top_k keeps all that equal the last. min_p then
    keeps tokens with at least the fraction min_p of the largest probability (Nguyen et al., 2024). The
    most probable token always remains.
    """
    # Subtract the maximum first: huge logits divided by a small temperature would overflow.
    p = ((logits - best) / max(sampling.temperature, MIN_TEMPERATURE)).softmax(dim=-1)
    tokens = None
    top_k = sampling.top_k if sampling.top_k < len(logits) else 0
    if top_k > 0 or sampling.top_p < 1.0:
        tokens = _within(logits, p, top_k, sampling.top_p)
        p = p[tokens]
    if sampling.min_p > 0.0:
        p = p.masked_fill(p < sampling.min_p * p.max(), 0.0)
    return p, tokens


def largest(logits: Tensor, count: int) -> Tensor:
    """logits float32 [V] -> the `count` tokens with the largest logits, int64, largest first; ties in
    the order of tokens."""
    values, tokens = _candidates(logits, max(CANDIDATES // 4, count + 1))
    if count > 0 and len(values) < len(logits) and not bool(values[count - 1] > values[-1]):
        tokens = logits.sort(descending=True, stable=True).indices
    return tokens[:count]


def _within(logits: Tensor, p: Tensor, top_k: int, top_p: float) -> Tensor:
    """The tokens that top_k (0: no limit) and top_p keep, ascending."""
    values, tokens = _candidates(logits, max(CANDIDATES, top_k + 1))
    kept = _kept(p[tokens], top_k, top_p)
    if len(values) < len(logits) and not (kept <= len(values) and bool(values[kept - 1] > values[-1])):
        if top_k > 0:
            tokens = logits.sort(descending=True, stable=True).indices
        else:
            # The other tokens, often most of the vocabulary, hold less than 1 - top_p together.
            tokens = (p >= (1.0 - top_p) / len(p)).nonzero().squeeze(1)
            tokens = tokens[logits[tokens].sort(descending=True, stable=True).indices]
        kept = _kept(p[tokens], top_k, top_p)
    return tokens[:kept].sort().values


def _kept(p: Tensor, top_k: int, top_p: float) -> int:
    """How many of these probabilities, in descending order, are kept; their number + 1 if they hold too
    little."""
    if top_p == 1.0:
        return top_k
    # In double precision and a fixed order: the same result for any number of threads.
    mass = p.cumsum(dim=0, dtype=torch.float64)
    total = mass[top_k - 1] if top_k > 0 else torch.ones_like(mass[0])
    return int(torch.searchsorted(mass, top_p * total)) + 1


def _candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits and their tokens; ties in the order of tokens.

    torch.topk picks any of the tokens that tie for the last place, so only the entries with a logit
    above the last one are certain.
    """
    if count >= len(logits):
        return logits.sort(descending=True, stable=True)
    values, tokens = logits.topk(count)
    tokens, order = tokens.sort()
    values, order = values[order].sort(descending=True, stable=True)
    return values, tokens[order]
