"""Reads the prompts of a job: one from the command line, or a file of them, each with its own settings.

Does not import torch: the file is read and checked before any rank is started, and errors name the
line. A file whose name ends in .jsonl (or whose first line begins with `{`) has an object on each line:

    {"prompt": "text"}  or  {"messages": [{"role": "user", "content": "text"}, ...]}

The object may also have `max_new_tokens`, `seed`, `temperature` and the other sampling keys, and an
`id` that is copied to the answer. Any other file has one prompt on each non-blank line, and no line
that begins with `{`. weights/texts.py defines where lines end.
"""

from __future__ import annotations

import json
import math
import re
import select
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any

from base.errors import InputError, nearest
from base.folders import expand
from base.streams import say
from engine.job import Job, check_beams, check_shown, sampling_of
from models.sampling_params import Sampling, check_sampling
from weights.files import parse_json
from weights.texts import lines_of, not_unicode

MAX_BYTES = 1 << 30  # largest file of prompts
_QUIET_S = 1.0  # after this wait for standard input, it is said that it is read
_ID_DEPTH = 32  # deeper nesting could hit Python's recursion limits on its way to the answer
_SAMPLING = tuple(field.name for field in fields(Sampling))
_KEYS = ("prompt", "messages", "id", "max_new_tokens", *_SAMPLING)


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation (`messages`) to answer. `shorten`: the user did not give
    max_new_tokens, so it is lowered where the prompt leaves less room. `name`: for errors."""

    text: str
    max_new_tokens: int
    sampling: Sampling
    messages: tuple[dict[str, str], ...] = ()
    id: Any = None
    name: str = field(default="the prompt")
    shorten: bool = False


def prompt_from_dict(data: dict[str, Any]) -> Prompt:
    """The inverse of `dataclasses.asdict`, for data that went through JSON."""
    sampling = dict(data["sampling"])
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    return Prompt(**data | {"sampling": Sampling(**sampling), "messages": tuple(data["messages"])})


def read_prompts(job: Job) -> tuple[Prompt, ...]:
    """Returns the job's prompts in order, () if it has none. Raises InputError that names the line."""
    sampling = sampling_of(job)
    if job.prompt:
        return (_plain("the prompt", job.prompt, job, sampling),)
    if not job.prompts:
        return ()
    source = "standard input" if job.prompts == "-" else job.prompts
    named = [
        (f"{source} line {i}", line)
        for i, data in enumerate(_read(job.prompts), 1)
        if (line := _decoded(f"{source} line {i}", data)).strip()
    ]
    if not named and job.prompts == "-":
        raise InputError(
            "prompt= is missing, and standard input has no prompt: write one on each line, or give "
            "prompt=TEXT or prompts=FILE"
        )
    if not named:
        raise InputError(f"prompts={job.prompts} has no prompt; write one on each line")
    if job.prompts.lower().endswith(".jsonl") or _opens_object(named[0][1]):
        return tuple(_prompt(name, line, job, sampling) for name, line in named)
    for name, line in named:
        if _opens_object(line):
            raise InputError(
                f"{name} begins like a JSON object, and the lines before it are plain text: a file "
                'must not mix them; write every line as an object: {"prompt": "..."} holds any text'
            )
    return tuple(_plain(name, line, job, sampling) for name, line in named)


def _opens_object(line: str) -> bool:
    return line.lstrip().startswith("{")


def _plain(name: str, text: str, job: Job, sampling: Sampling) -> Prompt:
    """A plain prompt with the job's settings."""
    messages = ({"role": "user", "content": text},) if job.chat else ()
    shorten = "max_new_tokens" not in job.given
    return Prompt(text, job.max_new_tokens, sampling, messages, name=name, shorten=shorten)


def _read(source: str) -> list[bytes]:
    """The lines of a file, or of standard input for "-"."""
    try:
        if source == "-":
            if not select.select([sys.stdin], [], [], _QUIET_S)[0]:
                say("reading prompts from standard input, one on each line, until it ends (Ctrl-D)")
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with expand(source).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"prompts={source} cannot be read: {error.strerror}") from error
    # no stdin; a name with a null; no home
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"prompts={source} cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"prompts={source} is larger than {MAX_BYTES >> 20} MiB; split the file")
    return lines_of(data)


def _decoded(name: str, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 at byte {error.start} (0x{line[error.start]:02x}); save it as UTF-8"
        ) from error


def _prompt(name: str, line: str, job: Job, sampling: Sampling) -> Prompt:
    data = _object(name, line)
    text, messages = data.get("prompt"), data.get("messages")
    if (text is None) == (messages is None):
        raise InputError(f"{name} must have either prompt or messages, and not both")
    if messages is not None:
        checked = _messages(name, messages)
    elif isinstance(text, str) and text:
        checked = ({"role": "user", "content": text},) if job.chat else ()
    else:
        raise InputError(f"{name}: prompt must be a non-empty string, not {str(text)[:40]!r}")
    count = data.get("max_new_tokens", job.max_new_tokens)
    if type(count) is not int or not 1 <= count < job.max_seq_len:
        raise InputError(
            f"{name}: max_new_tokens={str(count)[:40]} must be a whole number, at least 1 and below "
            f"max_seq_len={job.max_seq_len}"
        )
    return Prompt(
        text or "", count, _sampling(name, data, job, sampling), checked, data.get("id"), name,
        shorten=not {"max_new_tokens"} & {*data, *job.given},
    )  # fmt: skip


def _object(name: str, line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises InputError for unknown keys and text that is not Unicode."""
    try:
        data = parse_json(line.encode(), unique=True)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise InputError(f"{name} is not JSON that can be used: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{name} must be a JSON object with prompt or messages, not {line[:40]!r}")
    for key in data:
        if key not in _KEYS:
            hint = nearest(key, list(_KEYS)) or f"; it takes {', '.join(_KEYS)}"
            raise InputError(f"{name}: unknown key {key[:80]!r}{hint}")
    if isinstance(data.get("prompt"), str):
        _check_unicode(f"{name}: prompt", data["prompt"])
    if _depth(data.get("id")) > _ID_DEPTH:
        raise InputError(f"{name}: id is nested more than {_ID_DEPTH} deep; use a string or a number")
    _check_unicode(f"{name}: id", json.dumps(data.get("id"), ensure_ascii=False))
    return data


def _depth(value: Any) -> int:
    """How deep lists and objects are nested."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, list | dict)]:
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth


def _check_unicode(name: str, text: str) -> None:
    if why := not_unicode(text):
        raise InputError(f"{name} is not Unicode: {why}")


def _messages(name: str, messages: Any) -> tuple[dict[str, str], ...]:
    right = isinstance(messages, list) and all(
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
        for message in messages
    )
    if not right or not messages:
        raise InputError(f'{name}: messages must be a list of {{"role": "...", "content": "..."}}')
    for i, message in enumerate(messages, 1):
        for key, text in message.items():
            _check_unicode(f"{name}: {key} of message {i}", text)
    return tuple(messages)


def _sampling(name: str, data: dict[str, Any], job: Job, default: Sampling) -> Sampling:
    given = {key: data[key] for key in _SAMPLING if key in data}
    if "logit_bias" in given:
        bias = dict(_biases(name, given["logit_bias"]))
        banned = {token: value for token, value in default.logit_bias if value == -math.inf}
        given["logit_bias"] = tuple((banned | bias).items())
    for key, value in given.items():
        if key == "logit_bias":
            continue
        whole = isinstance(getattr(default, key), int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "whole " if whole else ""
            raise InputError(f"{name}: {key}={repr(value)[:40]} must be a {kind}number")
    sampling = replace(default, **given)
    try:
        check_sampling(sampling, None)
        check_beams(job, sampling)
        check_shown(job, sampling.logprobs)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return sampling


def _biases(name: str, bias: Any) -> tuple[tuple[int, float], ...]:
    """Parse an object from token id (a string, as JSON requires) to bias."""
    right = isinstance(bias, dict) and all(
        re.fullmatch("[0-9]{1,19}", token) and type(value) in (int, float)
        for token, value in bias.items()
    )
    if not right:
        raise InputError(f'{name}: logit_bias must be like {{"13": -100}}, not {str(bias)[:40]}')
    return tuple((int(token), float(value)) for token, value in bias.items())
