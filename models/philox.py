"""Random numbers as a function of a seed and a counter: no state, the same bits everywhere.

Philox4x32-10 of Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011: ten
rounds of multiplications scramble 128 bits of counter under 64 bits of key. A token needs one number,
so this uses Python's integers: a block takes 4 us. The same rounds as tensor operators take 150 us,
which pays off only for many blocks at once.

What is not here: many numbers at once (weights, noise for a whole vocabulary).
"""

from __future__ import annotations

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1
_ROUNDS = 10

Counter = tuple[int, int, int, int]


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Four random 32-bit words for a counter of four such words and a key of two."""
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (right >> 32) ^ b ^ k, right & _WORD, (left >> 32) ^ d ^ l, left & _WORD
        k, l = (k + _KEY_STEPS[0]) & _WORD, (l + _KEY_STEPS[1]) & _WORD  # noqa: E741
    return a, b, c, d


def uniform(seed: int, counter: int, stream: int, count: int) -> list[float]:
    """`count` numbers in (0, 1), each of 52 random bits. Seed and counter are taken modulo 2^64.

    The numbers are the centers of cells of 2^-52, so neither 0 nor 1 occurs. Different uses with the
    same seed and counter pass different `stream`s (32 bits).
    """
    numbers: list[float] = []
    key = (seed & _WORD, seed >> 32 & _WORD)
    for block in range((count + 1) // 2):
        a, b, c, d = philox((counter & _WORD, counter >> 32 & _WORD, stream, block), key)
        numbers += [_number(a, b), _number(c, d)]
    return numbers[:count]


def _number(high: int, low: int) -> float:
    # 52 bits: with 53 bits plus a half, the largest number would round to 1.0.
    return ((high << 32 | low) >> 12) * 2.0**-52 + 2.0**-53
