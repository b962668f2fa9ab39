"""Random numbers that are a function of a seed and a counter: no state, the same bits everywhere.

Philox4x32-10 of Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011: ten
rounds of multiplications scramble 128 bits of counter under 64 bits of key. A token takes one number,
so Python's integers do it: a block takes them 4 us, and the same rounds as tensor operators, which only
many blocks at once would repay, 150 us. Not for many numbers (weights, noise for a whole vocabulary).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1
_ROUNDS = 10

Counter = tuple[int, int, int, int]


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Four random words of 32 bits for four words of counter and two of key."""
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (right >> 32) ^ b ^ k, right & _WORD, (left >> 32) ^ d ^ l, left & _WORD
        k, l = (k + _KEY_STEPS[0]) & _WORD, (l + _KEY_STEPS[1]) & _WORD  # noqa: E741
    return a, b, c, d


def uniform(seed: int, counter: int, stream: int, count: int) -> list[float]:
    """`count` numbers in (0, 1), each of 52 random bits. Seed and counter are taken modulo 2^64.

    The numbers are centered in cells of 2^-52, so neither 0 nor 1 is among them. `stream` (32 bits)
    separates what different users draw with the same seed and counter.
    """
    numbers: list[float] = []
    key = (seed & _WORD, seed >> 32 & _WORD)
    for block in range((count + 1) // 2):
        a, b, c, d = philox((counter & _WORD, counter >> 32 & _WORD, stream, block), key)
        numbers += [_number(a, b), _number(c, d)]
    return numbers[:count]


def uniforms(seed: Tensor, counter: Tensor, stream: int, count: int) -> Tensor:
    """`uniform` of R rows: seed int64 [R], counter int64 [R] -> float64 [R, count], on their device."""
    pairs = zip(seed.tolist(), counter.tolist(), strict=True)
    numbers = [uniform(key, at, stream, count) for key, at in pairs]
    return torch.tensor(numbers, dtype=torch.float64, device=seed.device).view(len(numbers), count)


def _number(high: int, low: int) -> float:
    # 53 bits and a half would round to 1.0 at the top.
    return ((high << 32 | low) >> 12) * 2.0**-52 + 2.0**-53
