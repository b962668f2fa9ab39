"""How well a model predicts a text: the measure by which weights of fewer bits are judged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import Decoder


@torch.no_grad()
def perplexity(model: Decoder, tokens: Tensor) -> float:
    """exp of the mean surprise at each token after the first of its row, given those before it:

        exp(-1 / (B (T - 1)) * sum over b, and i from 1 to T - 1, of log p(t[b, i] | t[b, 0..i-1]))

    tokens: int64 [B, T], T > 1, whole rows without padding, each a text of its own (teacher forcing,
    one pass). Every rank calls this and gets the same number. The model's cache is allocated anew, for
    T tokens; all logits are held at once, 4 B T vocab_size bytes, and as much again.
    """
    batch, length = tokens.shape
    assert length > 1, "a single token has nothing before it"
    model.setup(batch, length)
    logits = model.all_logits(tokens, torch.arange(length, device=tokens.device))
    surprise = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return surprise.double().mean().exp().item()
