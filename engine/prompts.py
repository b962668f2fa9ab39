"""The prompts of a job: one on the command line, or a file of them, each with settings of its own.

Free of torch: a file is read and checked before any rank is started. A file whose name ends in .jsonl
(or whose first line is a JSON object) has an object on each line:

    {"prompt": "text"}  or  {"messages": [{"role": "user", "content": "text"}, ...]}

with any of `max_new_tokens`, `seed`, `temperature` and the other keys of sampling, and an `id` that
comes back with the answer. Any other file has a prompt on each line that is not empty.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any

from base.folders import expand
from engine.job import Job, check_beams, sampling_of
from models.sampling_params import Sampling, check_sampling
from weights.errors import InputError, nearest

MAX_BYTES = 1 << 30  # of a file of prompts
_SAMPLING = tuple(field.name for field in fields(Sampling))
_KEYS = ("prompt", "messages", "id", "max_new_tokens", *_SAMPLING)


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation (`messages`) to answer."""

    text: str
    max_new_tokens: int
    sampling: Sampling
    messages: tuple[dict[str, str], ...] = ()
    id: Any = None
    name: str = field(default="the prompt")


def prompt_from_dict(data: dict[str, Any]) -> Prompt:
    """The inverse of `dataclasses.asdict`, by way of JSON."""
    sampling = dict(data["sampling"])
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    return Prompt(**data | {"sampling": Sampling(**sampling), "messages": tuple(data["messages"])})


def read_prompts(job: Job) -> tuple[Prompt, ...]:
    """The job's prompts, in order; none where it has none. Raises InputError that names the line."""
    sampling = sampling_of(job)
    if job.prompt:
        messages = ({"role": "user", "content": job.prompt},) if job.chat else ()
        return (Prompt(job.prompt, job.max_new_tokens, sampling, messages),)
    if not job.prompts:
        return ()
    lines = _read(job.prompts).splitlines()
    named = [(f"{job.prompts} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not named:
        raise InputError(f"prompts={job.prompts} has no prompt; it takes one per line")
    if not (job.prompts.endswith(".jsonl") or named[0][1].lstrip().startswith("{")):
        return tuple(
            Prompt(
                line,
                job.max_new_tokens,
                sampling,
                ({"role": "user", "content": line},) if job.chat else (),
                name=name,
            )
            for name, line in named
        )
    return tuple(_prompt(name, line, job, sampling) for name, line in named)


def _read(source: str) -> str:
    try:
        if source == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with expand(source).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"prompts={source} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"prompts={source} has more than {MAX_BYTES >> 20} MiB; divide it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"prompts={source} is not UTF-8 at byte {error.start}") from error


def _prompt(name: str, line: str, job: Job, sampling: Sampling) -> Prompt:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{name} must be a JSON object with prompt or messages, not {line[:40]!r}")
    for key in data:
        if key not in _KEYS:
            hint = nearest(key, list(_KEYS)) or f"; it takes {', '.join(_KEYS)}"
            raise InputError(f"{name}: unknown key {key!r}{hint}")
    text, messages = data.get("prompt"), data.get("messages")
    if (text is None) == (messages is None):
        raise InputError(f"{name} must have either prompt or messages")
    if messages is not None:
        checked = _messages(name, messages)
    elif isinstance(text, str) and text:
        checked = ({"role": "user", "content": text},) if job.chat else ()
    else:
        raise InputError(f"{name}: prompt must be a text that is not empty, not {str(text)[:40]!r}")
    count = data.get("max_new_tokens", job.max_new_tokens)
    if type(count) is not int or not 1 <= count < job.max_seq_len:
        raise InputError(
            f"{name}: max_new_tokens={count!r} must be a number from 1 to below max_seq_len="
            f"{job.max_seq_len}"
        )
    return Prompt(
        text or "", count, _sampling(name, data, job, sampling), checked, data.get("id"), name
    )


def _messages(name: str, messages: Any) -> tuple[dict[str, str], ...]:
    right = isinstance(messages, list) and all(
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
        for message in messages
    )
    if not right or not messages:
        raise InputError(f'{name}: messages must be a list of {{"role": "...", "content": "..."}}')
    return tuple(messages)


def _sampling(name: str, data: dict[str, Any], job: Job, default: Sampling) -> Sampling:
    given = {key: data[key] for key in _SAMPLING if key in data}
    bias = given.get("logit_bias")
    if bias is not None:
        try:
            pairs = bias.items() if isinstance(bias, dict) else bias
            given["logit_bias"] = tuple((int(token), float(value)) for token, value in pairs)
        except (TypeError, ValueError) as error:
            raise InputError(
                f'{name}: logit_bias must be like {{"13": -100}}, not {str(bias)[:40]}'
            ) from error
    for key, value in given.items():
        if key == "logit_bias":
            continue
        whole = isinstance(getattr(default, key), int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise InputError(f"{name}: {key}={value!r} must be a {'whole ' if whole else ''}number")
    sampling = replace(default, **given)
    try:
        check_sampling(sampling, None)
        check_beams(job, sampling)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return sampling
