"""Requests and answers of an engine, and how prompts are packed into calls. Pure.

All ranks hold the same requests in the same slots, so each rank plans the same steps by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from base.errors import InputError
from models.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt's tokens and how to continue them. The keys of the first `cached` tokens are in cache
    slot 0 from an earlier request (only for an engine with one slot). `name`: for errors."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    cached: int = 0
    name: str = "the prompt"


@dataclass(frozen=True)
class Logprobs:
    """The log-probability of one token, and the most probable tokens with theirs, as the model gives
    them (before temperature, penalties and biases)."""

    logprob: float
    top_tokens: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """The generated tokens (without a stop token) and why they end: "stop", "length" or "cancelled".

    Times in seconds: `ttft_s` from the call to the first token, `tpot_s` the mean time of a later
    token, 0 if there is none. `drafted` draft tokens were proposed, `accepted` of them accepted.
    `logprobs` is empty unless the request asked for them."""

    tokens: tuple[int, ...]
    finish: str
    ttft_s: float
    tpot_s: float
    logprobs: tuple[Logprobs, ...] = ()
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class PromptPart:
    """Tokens begin..end-1 of the prompt in slot `row`."""

    row: int
    begin: int
    end: int


def split_prompts(
    prompts: Sequence[tuple[int, int, int]], chunk: int, mixed: bool
) -> Iterator[list[PromptPart]]:
    """Divide prompts, each (row, begin, end), into calls of at most `chunk` tokens, in order. Unless
    `mixed`, a call holds tokens of one slot only."""
    call: list[PromptPart] = []
    room = chunk
    for row, begin, end in prompts:
        while begin < end:
            if call and (room == 0 or (not mixed and call[-1].row != row)):
                yield call
                call, room = [], chunk
            size = min(room, end - begin)
            call.append(PromptPart(row, begin, begin + size))
            begin += size
            room -= size
    if call:
        yield call


def check_request(length: int, max_new_tokens: int, max_seq_len: int, name: str = "the prompt") -> None:
    """Raise InputError unless a prompt of `length` tokens has any, and fits with its answer into
    `max_seq_len`."""
    if length == 0:
        raise InputError(f"{name} has no tokens; give at least one character")
    needed = length + max_new_tokens
    if needed > max_seq_len:
        raise InputError(
            f"{name} has {length} tokens: with max_new_tokens={max_new_tokens} it needs "
            f"max_seq_len={needed} or more, but max_seq_len={max_seq_len}"
        )
