"""What an engine is asked and what it answers, and how prompts are packed into steps. Pure.

Every rank holds the same requests and the same rows, so every rank plans the same steps by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from base.errors import InputError
from models.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt's tokens and how to continue them. The first `cached` of them lie in cache row 0 from an
    earlier request (that goes with an engine of one row). `name` is what errors call it."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    cached: int = 0
    name: str = "the prompt"


@dataclass(frozen=True)
class Logprobs:
    """Of one token, as the model alone gives it: its log-probability, and the likeliest tokens'."""

    logprob: float
    top_tokens: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """Tokens made (without a stop token), why they end ("stop", "length" or "cancelled"), and times in
    seconds: `ttft_s` from the call to the first token, `tpot_s` the mean of those after it, 0 where
    there are none. `drafted` tokens were guessed, `accepted` of them right. `logprobs` are empty where
    none were asked for."""

    tokens: tuple[int, ...]
    finish: str
    ttft_s: float
    tpot_s: float
    logprobs: tuple[Logprobs, ...] = ()
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Piece:
    """Tokens begin..end-1 of a row's prompt."""

    row: int
    begin: int
    end: int


def pack(prompts: Sequence[tuple[int, int, int]], chunk: int, mixed: bool) -> Iterator[list[Piece]]:
    """Divide prompts, (row, begin, end) each, into calls of `chunk` tokens at most, in order. Unless
    `mixed`, a call holds tokens of one row."""
    call: list[Piece] = []
    room = chunk
    for row, begin, end in prompts:
        while begin < end:
            if call and (room == 0 or (not mixed and call[-1].row != row)):
                yield call
                call, room = [], chunk
            size = min(room, end - begin)
            call.append(Piece(row, begin, begin + size))
            begin += size
            room -= size
    if call:
        yield call


def check_request(length: int, max_new_tokens: int, max_seq_len: int, name: str = "the prompt") -> None:
    """Raise InputError unless prompt and answer fit together."""
    if length == 0:
        raise InputError(f"{name} has no tokens; give at least one character")
    needed = length + max_new_tokens
    if needed > max_seq_len:
        raise InputError(
            f"{name} has {length} tokens: with max_new_tokens={max_new_tokens} it needs "
            f"max_seq_len={needed} or more, and max_seq_len={max_seq_len}"
        )
