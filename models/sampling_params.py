"""The sampling parameters of a request, and their checks. Free of torch, so that the command can use
them.

The ranges are those of OpenAI's API where it has the parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from base.errors import InputError

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The defaults are greedy and change no logits.

    `repetition_penalty` applies to tokens of prompt and answer (Keskar et al., 2019, as in
    transformers), `presence_penalty` and `frequency_penalty` to tokens of the answer only (as in OpenAI
    and vLLM). `logit_bias`: pairs of a token and the number added to its logit; minus infinity bans the
    token. `seed`: any 64-bit integer.
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int = -1  # -1: none; n >= 0: of the chosen token and of the n most probable tokens

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits of later ones."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def is_plain(self) -> bool:
        """Whether the request only needs the argmax of the model's logits."""
        return (
            self.temperature == 0.0 and not self.penalizes and not self.logit_bias and self.logprobs < 0
        )


def check_sampling(sampling: Sampling, vocab_size: int | None) -> None:
    """Raise InputError for a value out of its range. `vocab_size` None: it is not known yet."""
    s = sampling
    _check_number("temperature", s.temperature, 0.0, 1e4, "0 is greedy, 1 is neutral")
    _check_integer("top_k", s.top_k, 0, 2**63 - 1, "0 is no limit")
    _check_number("top_p", s.top_p, 0.0, 1.0, "1 is no limit", without_low=True)
    _check_number("min_p", s.min_p, 0.0, 1.0, "0 is no limit", without_high=True)
    # Beyond these limits, the product with a logit can overflow float32.
    _check_number("repetition_penalty", s.repetition_penalty, 1e-3, 1e3, "1 is neutral")
    _check_number("presence_penalty", s.presence_penalty, -2.0, 2.0, "0 is neutral")
    _check_number("frequency_penalty", s.frequency_penalty, -2.0, 2.0, "0 is neutral")
    _check_integer("seed", s.seed, -(2**63), 2**63 - 1, "any other integer of 64 bits will do")
    _check_integer("logprobs", s.logprobs, -1, MAX_LOGPROBS, "-1 is none; ask for fewer")
    last = 2**63 - 1 if vocab_size is None else vocab_size - 1
    for token, bias in s.logit_bias:
        _check_integer("a token of logit_bias", token, 0, last, "name tokens of this vocabulary")
        if bias != -math.inf:
            _check_number(f"logit_bias of token {token}", bias, -100.0, 100.0, "-inf bans a token")
    tokens = [token for token, _ in s.logit_bias]
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise InputError(f"logit_bias names token {twice} twice; give one bias for each token")


def _check_number(
    name: str,
    value: float,
    low: float,
    high: float,
    hint: str,
    *,
    without_low: bool = False,
    without_high: bool = False,
) -> None:
    """Raise InputError unless the value is in its range. NaN fails, since comparisons with it are
    False."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = number and low <= value <= high and math.isfinite(value)
    if not inside or (without_low and value == low) or (without_high and value == high):
        lowest = f"above {low:g}" if without_low else f"at least {low:g}"
        highest = f"below {high:g}" if without_high else f"at most {high:g}"
        raise InputError(f"{name}={value!r} must be a number {lowest} and {highest}; {hint}")


def _check_integer(name: str, value: int, low: int, high: int, hint: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name}={value!r} must be an integer from {low} to {high}; {hint}")
