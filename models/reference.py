"""The plain generation loop: prefill in one call, then one token at a time, eager. It is the test
oracle for `engine`."""

from __future__ import annotations

import torch

from comm import ops
from comm.group import Group
from models.decoder import Decoder
from models.sampling import Sampling, choose, make_sampler, start_row


@torch.no_grad()
def generate(
    model: Decoder,
    group: Group,
    prompt: list[int],
    max_new_tokens: int,
    stop_tokens: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
) -> list[int]:
    """The tokens generated after `prompt`, at most `max_new_tokens`, without the stop token. All ranks
    call this and get the same tokens."""
    sampler = make_sampler(1, model.config.vocab_size)
    start_row(sampler, 0, sampling or Sampling(), prompt)
    model.setup(1, len(prompt) + max_new_tokens)
    tokens = torch.tensor([prompt])
    positions = torch.arange(len(prompt))
    made: list[int] = []
    while len(made) < max_new_tokens:
        logits = model(tokens, positions, last=torch.tensor([tokens.shape[1] - 1]))
        choice = choose(sampler, logits, torch.tensor([len(made)]))
        token = ops.broadcast(choice.tokens, 0, group)
        if int(token) in stop_tokens:
            break
        made.append(int(token))
        tokens = token.view(1, 1)
        positions = positions[-1:] + 1
    return made
