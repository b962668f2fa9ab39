"""The compiled loop: static shapes, one graph for a chunk of the prompt and one for a new token.

A prompt is run in chunks of a fixed size, the last one padded, so a prompt of any length meets the
same two graphs and compiles nothing new. Positions are tensors, not Python numbers, for the same
reason. Rank 0 samples and tells the others, so ranks need no equal random states.

What is not here: batches, speculation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from comm import ops
from comm.group import Group
from engine.memory import CHUNK
from models.decoder import Decoder
from models.sampling import Sampler, Sampling, choose, make_sampler, start_row
from weights.errors import InputError

if TYPE_CHECKING:  # transformers is loaded for engine=hf alone
    from models.hf import HfModel

AnyModel: TypeAlias = "Decoder | HfModel"
PrefillStep = Callable[[Tensor, Tensor, Tensor], Tensor]
DecodeStep = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Runner:
    """A model with its cache allocated, and its two steps, compiled or not.

    `prefill(tokens [1, CHUNK], positions [1, CHUNK], last [1])` and `decode(token [1, 1], position
    [1, 1])` both return float32 logits [1, vocab_size].
    """

    group: Group
    prefill: PrefillStep
    decode: DecodeStep
    max_seq_len: int


@dataclass(frozen=True)
class Result:
    """Tokens made (without the stop token), and times in seconds. `tpot_s` is the mean time of the
    tokens after the first (a stop token counts as one), 0 when there were none."""

    tokens: list[int]
    ttft_s: float
    tpot_s: float


def make_runner(model: AnyModel, group: Group, max_seq_len: int, compiled: bool) -> Runner:
    """Allocate the cache for `max_seq_len` tokens and wrap the steps. Nothing is compiled yet."""
    # Whole chunks, so that the padding of the last one has a place to go.
    model.setup(1, -(-max_seq_len // CHUNK) * CHUNK)

    # Two functions, because the compiler keeps its results by function: each has one shape.
    def prefill(tokens: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        logits: Tensor = model(tokens, positions, last)
        return logits

    def decode(token: Tensor, position: Tensor) -> Tensor:
        logits: Tensor = model(token, position)
        return logits

    if not compiled:
        return Runner(group, prefill, decode, max_seq_len)
    return Runner(
        group,
        torch.compile(prefill, fullgraph=True, dynamic=False),
        torch.compile(decode, fullgraph=True, dynamic=False),
        max_seq_len,
    )


@torch.no_grad()
def warm_up(runner: Runner) -> float:
    """Run each step once, which compiles it; returns the seconds it took.

    The cache keeps what these steps wrote; generation overwrites it before it is read.
    """
    start = time.perf_counter()
    positions = torch.arange(CHUNK).unsqueeze(0)
    runner.prefill(torch.zeros(1, CHUNK, dtype=torch.int64), positions, torch.tensor([0]))
    # Made as `generate` makes them: a compiled step also remembers strides.
    runner.decode(torch.tensor([[0]]), torch.tensor([[0]]))
    return time.perf_counter() - start


@torch.no_grad()
def generate(
    runner: Runner,
    prompt: list[int],
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    sampling: Sampling,
    seed: int,
    on_token: Callable[[int], None] = lambda token: None,
) -> Result:
    """Continue `prompt` (the same on all ranks) by at most `max_new_tokens` tokens.

    `sampling`, `seed` and `stop_tokens` matter on rank 0 alone, which decides for all. `on_token` is
    called with each token as it is made. Raises InputError for a prompt that is empty
    or does not fit `max_seq_len`.
    """
    check_prompt(len(prompt), max_new_tokens, runner.max_seq_len)
    start = time.perf_counter()
    logits = _prefill(runner, prompt)
    sampler = make_sampler(1, logits.shape[1])
    start_row(sampler, 0, replace(sampling, seed=seed), prompt)
    tokens: list[int] = []
    first = last = start
    steps = 0
    while True:
        token, stop = _agree(runner.group, logits, sampler, steps, stop_tokens)
        last = time.perf_counter()
        first = last if steps == 0 else first
        if stop:
            break
        tokens.append(token)
        on_token(token)
        if len(tokens) == max_new_tokens:
            break
        position = torch.tensor([[len(prompt) + len(tokens) - 1]])
        logits = runner.decode(torch.tensor([[token]]), position)
        steps += 1
    return Result(tokens, first - start, (last - first) / steps if steps else 0.0)


def check_prompt(length: int, max_new_tokens: int, max_seq_len: int) -> None:
    """Raise InputError unless prompt and answer fit together."""
    if length == 0:
        raise InputError("the prompt has no tokens; give at least one character")
    if length + max_new_tokens > max_seq_len:
        raise InputError(
            f"the prompt has {length} tokens: with max_new_tokens={max_new_tokens} it needs "
            f"max_seq_len={length + max_new_tokens} or more, and max_seq_len={max_seq_len}"
        )


def _prefill(runner: Runner, prompt: list[int]) -> Tensor:
    """Run the prompt in padded chunks; the logits after its last token."""
    for begin in range(0, len(prompt), CHUNK):
        chunk = prompt[begin : begin + CHUNK]
        padded = torch.tensor([chunk + [0] * (CHUNK - len(chunk))])
        positions = torch.arange(begin, begin + CHUNK).unsqueeze(0)
        logits = runner.prefill(padded, positions, torch.tensor([len(chunk) - 1]))
    return logits


def _agree(
    group: Group,
    logits: Tensor,
    sampler: Sampler,
    made: int,
    stop_tokens: frozenset[int],
) -> tuple[int, bool]:
    """Rank 0 samples a token and decides whether it is the last; all ranks return its decision."""
    decision = torch.zeros(2, dtype=torch.int64)
    if group.rank == 0:
        token = int(choose(sampler, logits, torch.tensor([made])).tokens)
        decision = torch.tensor([token, token in stop_tokens])
    token, stop = ops.broadcast(decision, 0, group).tolist()
    return token, bool(stop)
