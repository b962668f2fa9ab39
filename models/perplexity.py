"""Perplexity: how well a model predicts a text, the measure for the loss by quantization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import Decoder


@torch.no_grad()
def perplexity(model: Decoder, tokens: Tensor) -> float:
    """exp of the mean negative log-likelihood of each token after the first, given those before it:

        exp(-1 / (B (T - 1)) * sum over b, and i from 1 to T - 1, of log p(t[b, i] | t[b, 0..i-1]))

    tokens: int64 [B, T], T > 1: B independent texts without padding (teacher forcing, one pass). Every
    rank calls this and gets the same number. The model's cache is reallocated for T tokens. All logits
    are held at once: 4 B T V bytes, and as much again.
    """
    batch, length = tokens.shape
    assert length > 1, "a single token has nothing before it"
    model.setup(batch, length)
    logits = model.all_logits(tokens, torch.arange(length, device=tokens.device))
    surprise = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return surprise.double().mean().exp().item()
