"""From logits to a token. Only rank 0 samples; the others are told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 means greedy; `top_k` 0 and `top_p` 1 mean no limit."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token for each row: float32 [B, V] -> int64 [B].

    Limits apply in the usual order: temperature, then the `top_k` likeliest, then the smallest set of
    those whose probability reaches `top_p` (Holtzman et al., 2019). Equal logits resolve to the
    lowest token, so that greedy output does not depend on how a vocabulary is split.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        scaled, tokens = scaled.topk(sampling.top_k, dim=-1)
    else:
        scaled, tokens = scaled.sort(dim=-1, descending=True)
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, choice).squeeze(-1)
