"""Which of a job's keys can change between two turns of a chat, and the job with them changed. Pure.

The values are checked by the job's own parser. What is not here: compiling the steps that a change
needs (`engine.opening`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from base.errors import InputError, nearest
from engine.job import KEYS, Job, parse_job, sampling_of
from models.sampling_params import check_sampling

CHANGEABLE = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "max_new_tokens",
)  # fmt: skip
_GENERATE = ("prompt", "prompts", "chat", "output", "num_beams", "length_penalty")
_CACHE = ("max_seq_len", "batch", "kv_dtype", "draft_tokens")
_LATER = ("generation_config", "check_every", "logprobs")


def settings_of(job: Job) -> dict[str, Any]:
    """The keys that can change, with their values."""
    return {key: getattr(job, key) for key in CHANGEABLE}


def changed_job(job: Job, words: Sequence[str], max_seq_len: int, vocab_size: int) -> Job:
    """The job with the `key=value` words applied. `max_seq_len`: the room of the cache. Raises
    InputError, which names the key and says why it cannot change, or what is wrong with its value."""
    values: dict[str, str] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise InputError(f"{word!r} is not key=value; such as: temperature=0.7 seed=3")
        if key not in CHANGEABLE:
            raise InputError(_refusal(key))
        values[key] = text
    length = max(max_seq_len, 2)
    parsed = parse_job({"model": job.model, "max_seq_len": str(length), **values}, need_prompt=False)
    given = tuple(dict.fromkeys((*job.given, *values)))
    changed = replace(job, given=given, **{key: getattr(parsed, key) for key in values})
    check_sampling(sampling_of(changed), vocab_size)
    return changed


def _refusal(key: str) -> str:
    others = f"what can: {', '.join(CHANGEABLE)}"
    if key not in KEYS:
        return f"unknown key {key!r}{nearest(key, list(CHANGEABLE))}; {others}"
    if key in _GENERATE:
        return f"{key}= goes with generate, not with chat; {others}"
    if key in _CACHE:
        why = "the cache was made for its value"
    elif key in _LATER:
        why = "it is read once, at the start"
    else:
        why = "the model was loaded and compiled with its value"
    return (
        f"{key}= cannot change during a chat: {why}; start another chat for it. {others.capitalize()}"
    )
