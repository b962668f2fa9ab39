"""Draft tokens: proposes them by prompt lookup, and decides which are accepted. Pure functions.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): tokens that followed the text's last tokens
earlier may follow them again. It costs nothing, and works where an answer quotes: summaries, edits,
code, lists.

Speculative sampling (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
2023; Chen et al., 2023) draws a draft token x from the draft's distribution q. It accepts x with
probability min(1, p(x) / q(x)), where p is the model's distribution. Otherwise it draws a replacement
from max(0, p - q), normalized. Here draft tokens are deterministic, q(x) = 1: x is accepted with
probability p(x), and otherwise replaced by a draw from p without x. Drawing a token from p and
comparing it with x does exactly that, so that is what `verify_drafts` does. It uses the random numbers,
penalties and log-probabilities of decoding without drafts, so the text is equal token by token (as far
as logits do not depend on how many tokens a step has).

Not done: sampling the draft tokens from the draft model's distribution. At high temperatures more would
be accepted (the sum of min(p, q)), but it needs q of every draft token, and two more random numbers for
each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.sampling import Choice, Sampler, choose

LONGEST = 3  # tokens of the longest n-gram that is looked up, as in Saxena's code; then 2, then 1


@dataclass
class Index:
    """An index of a growing text. `follows`: for each n-gram of up to LONGEST tokens, the position
    right after its latest occurrence. `size`: tokens entered so far."""

    follows: dict[tuple[int, ...], int] = field(default_factory=dict)
    size: int = 0


def look_up(index: Index, text: Sequence[int], count: int) -> list[int]:
    """Returns `count` tokens that may follow `text`, or []: those that followed the latest earlier
    occurrence of its longest indexed suffix. If they reach the end of the text, they continue with
    themselves, as in Lempel and Ziv's compression: a text that repeats itself is expected to continue.

    `index` is the index of this text; it is updated.
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
    draft: list[int] = []
    for place in range(start, start + count):
        draft.append(text[place] if place < len(text) else draft[place - len(text)])
    return draft


@dataclass(frozen=True)
class DraftVerdict:
    """The result for a slot: how many of its draft tokens were accepted, and the last token that was
    chosen. Unless the text ended there, that token follows the accepted ones."""

    accepted: int
    token: int


def verify_drafts(
    sampler: Sampler,
    logits: Tensor,
    drafts: Mapping[int, Sequence[int]],
    made: Mapping[int, int],
    keep: Callable[[int, int, Choice], bool],
) -> dict[int, DraftVerdict]:
    """Choose the next tokens of each slot while they equal the draft tokens, and one more token.

    logits: float32 [M, vocab_size]; for each slot of `drafts`, in order, the logits after its last
    token and after each of its draft tokens. `made`: tokens that each slot's answer has. Each token is
    chosen and recorded in the sampler before the next position is sampled. `keep(row, token, choice)`
    is called for each token and returns True if the text ends with it. Raises InputError as `choose`
    does.
    """
    num_rows = len(sampler.rows)
    first, total = {}, 0
    for row, draft in drafts.items():
        first[row] = total
        total += len(draft) + 1
    assert total == len(logits)
    verdicts: dict[int, DraftVerdict] = {}
    going, depth = list(drafts), 0
    while going:
        places, counts = torch.zeros(2, num_rows, dtype=torch.int64)
        active = torch.zeros(num_rows, dtype=torch.bool)
        for row in going:
            places[row], counts[row], active[row] = first[row] + depth, made[row] + depth, True
        choice = choose(sampler, logits[places], counts, active)
        tokens = choice.tokens.tolist()
        accepted = {row for row in going if is_accepted(drafts[row], depth, tokens[row])}
        ended = {row for row in going if keep(row, tokens[row], choice)}
        for row in going:
            verdicts[row] = DraftVerdict(depth + (row in accepted), tokens[row])
        going = [row for row in going if row in accepted and row not in ended]
        depth += 1
    return verdicts


def is_accepted(draft: Sequence[int], depth: int, token: int) -> bool:
    """Whether `token` equals the draft token at `depth`; False if there is none."""
    return depth < len(draft) and draft[depth] == token
