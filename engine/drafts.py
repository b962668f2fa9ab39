"""Guessed tokens: where they come from without a model, and which of them a text keeps. Pure.

Prompt look-up (Saxena, "Prompt Lookup Decoding", 2023): what followed the text's last words earlier may
follow them again. It costs nothing, and is right where an answer quotes: summaries, edits, code, lists.

Speculative sampling (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
2023; Chen et al., 2023) keeps a guess x from a draft's distribution q with probability min(1, p(x) /
q(x)), p being the model's, and replaces it by a draw from max(0, p - q), normalized, if not. Here every
guess is certain, q(x) = 1: it is kept with probability p(x), and else replaced by a draw from p without
x. That is just what happens if a token is drawn from p and compared with the guess, so this is what is
done: with the numbers, penalties and log-probabilities of a text without guesses, which it therefore
equals token by token (as far as logits do not depend on how many tokens a step has). To draw the
guesses from the draft model's own distribution would keep more of them at high temperatures
(the sum of min(p, q)); it would take q of every guess, and two more numbers for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.sampling import Choice, Sampler, choose

LONGEST = 3  # tokens that are looked up at most, as in Saxena's code; then 2, then 1


@dataclass
class Index:
    """Of a text that grows: where the token lies that followed the latest occurrence of each run of up
    to LONGEST tokens. `size`: tokens entered."""

    follows: dict[tuple[int, ...], int] = field(default_factory=dict)
    size: int = 0


def look_up(index: Index, text: Sequence[int], count: int) -> list[int]:
    """`count` tokens that may follow `text`, or none: those that followed the latest earlier occurrence
    of its longest possible end. Where they reach the end of the text, they go on with themselves, as in
    Lempel and Ziv's compression: a text that repeats itself is guessed to go on doing so.

    `index` is that of this text; it is brought up to date.
    """
    for place in range(max(index.size, 1), len(text)):
        for length in range(1, min(LONGEST, place) + 1):
            index.follows[tuple(text[place - length : place])] = place
    index.size = len(text)
    for length in range(LONGEST, 0, -1):
        start = index.follows.get(tuple(text[-length:]))
        if start is not None:
            break
    else:
        return []
    guess: list[int] = []
    for place in range(start, start + count):
        guess.append(text[place] if place < len(text) else guess[place - len(text)])
    return guess


@dataclass(frozen=True)
class Verdict:
    """Of a row: how many of its guesses were right, and the last token that was chosen. Unless the
    text ended there, that one follows the right guesses."""

    accepted: int
    token: int


def judge(
    sampler: Sampler,
    logits: Tensor,
    guesses: Mapping[int, Sequence[int]],
    made: Mapping[int, int],
    keep: Callable[[int, int, Choice], bool],
) -> dict[int, Verdict]:
    """Choose the next tokens of rows, as long as the guesses foretell them, and one more.

    logits: float32 [M, vocab_size], for each row of `guesses`, in order, those after its last token and
    after each guess. `made`: how many tokens its answer has. Each token is chosen and recorded in the
    sampler before the next position is looked at, and `keep(row, token, choice)` takes it in: true
    where the text ends with it. Raises InputError as `choose` does.
    """
    num_rows = len(sampler.rows)
    first, total = {}, 0
    for row, guess in guesses.items():
        first[row] = total
        total += len(guess) + 1
    assert total == len(logits)
    verdicts: dict[int, Verdict] = {}
    going, depth = list(guesses), 0
    while going:
        places, counts = torch.zeros(2, num_rows, dtype=torch.int64)
        active = torch.zeros(num_rows, dtype=torch.bool)
        for row in going:
            places[row], counts[row], active[row] = first[row] + depth, made[row] + depth, True
        choice = choose(sampler, logits[places], counts, active)
        tokens = choice.tokens.tolist()
        right = {row for row in going if is_right(guesses[row], depth, tokens[row])}
        ended = {row for row in going if keep(row, tokens[row], choice)}
        for row in going:
            verdicts[row] = Verdict(depth + (row in right), tokens[row])
        going = [row for row in going if row in right and row not in ended]
        depth += 1
    return verdicts


def is_right(guess: Sequence[int], depth: int, token: int) -> bool:
    """Whether the token that was chosen is the one that was guessed, if any was."""
    return depth < len(guess) and guess[depth] == token
