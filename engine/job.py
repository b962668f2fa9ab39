"""What a generation job is asked for: the `key=value` words of the command line, checked.

Free of torch: the launcher's side checks a job before any rank is started, and hands the result to
the ranks as JSON. OmegaConf holds the types, so that `max_new_tokens=ten` is refused with the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from base.errors import InputError, nearest
from engine.dtypes import dtype_name, kv_dtype_name
from models.sampling_params import Sampling, check_sampling
from weights.schemes import HEADS, SCHEMES

LOOKUP = "lookup"  # the draft that needs no model


@dataclass(frozen=True)
class Job:
    """The keys, their types and their defaults. Lengths are in tokens. `given` is none of the keys: it
    names those that the user gave, and the others may be adapted to the model."""

    model: str = MISSING
    prompt: str = ""
    prompts: str = ""
    weights: str = "auto"
    engine: str = "auto"
    device: str = "auto"
    max_new_tokens: int = 64
    max_seq_len: int = 1024
    batch: int = 0
    dtype: str = "auto"
    kv_dtype: str = "auto"
    quant: str = "auto"
    quant_head: str = "int8"
    activations: str = "auto"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: str = ""
    logprobs: int = -1
    seed: int = 0
    stop: str = ""
    generation_config: str = "auto"
    check_every: int = 8
    num_beams: int = 1
    length_penalty: float = 1.0
    draft: str = ""
    draft_tokens: int = 4
    compile: bool = True
    chat: bool = False
    output: str = "text"
    # Dimensions that override a preset, for a quick look at a large model's shape.
    dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    vocab_size: int | None = None
    given: tuple[str, ...] = ()


KEYS = tuple(field.name for field in fields(Job) if field.name != "given")
HELP: dict[str, str] = {
    "model": "a preset, a .gguf file, a folder of safetensors, or OWNER/NAME in the hub cache",
    "prompt": "the text to continue",
    "prompts": "or a file of them, one per line or JSON lines; - is standard input",
    "weights": "auto (find them) or random (the shape of a preset, without weights)",
    "engine": "auto or yoke (our models), hf (any with a plan in the transformers library)",
    "device": "auto (what the ranks are placed on), cpu or cuda",
    "max_new_tokens": "how many tokens to make at most",
    "max_seq_len": "room for prompt and answer together, in tokens; a model may have less",
    "batch": "texts made at once; 0: up to 8, as there are prompts and memory",
    "dtype": "auto, float32, bfloat16 or float16; kv_dtype= of the KV cache, int8 too",
    "quant": "auto (keep weights that the file has quantized), none, or to: " + ", ".join(SCHEMES),
    "quant_head": "the LM head, where quant= names a scheme: int8, same (as quant=) or none",
    "activations": "int8 rounds a prompt's to 8 bits where weights have 8: faster with AMX",
    "temperature": "0 is greedy; what limits the choice: top_k= [0], top_p= [1], min_p= [0]",
    "logit_bias": "ID:BIAS,... is added to logits, -inf bans; repetition_penalty= [1], "
    "presence_penalty= and frequency_penalty= [0]",
    "logprobs": "with output=json: log-probabilities of each token and of N others",
    "seed": "of the sampling, and of random weights",
    "stop": 'a text that ends the answer, or a JSON list of them: ["a", "b"]',
    "generation_config": "auto (defaults of sampling from the model's file of that name) or none",
    "check_every": "steps from one look for ended texts to the next",
    "num_beams": "width of a beam search; 1 is none. length_penalty= [1]",
    "draft": "guess tokens: lookup (in the text so far) or a small model; draft_tokens= [4]",
    "compile": "compile the steps (slower start, faster tokens)",
    "chat": "wrap the prompt in the model's chat template",
    "output": "text (streamed) or json (an object for each prompt)",
    "num_layers": "with weights=random: overrides the preset; likewise dim, num_heads, "
    "num_kv_heads, ffn_dim, vocab_size",
}


def help_lines() -> list[str]:
    """The keys, a line each, for the help."""
    lines = []
    for key, text in HELP.items():
        default = getattr(Job, key)
        shown = "" if default in (None, "???", "") else f" [{default}]"
        lines.append(f"  {key + '=':<18}{text}{shown}")
    lines.insert(1, f"  {'':<18}presets: tiny, smollm2-135m, ...; python launch.py models lists them")
    return lines


_TYPES: dict[str, Any] = {field.name: field.type for field in fields(Job) if field.name in KEYS}
_TEXTS = tuple(key for key in KEYS if _TYPES[key] == "str")
_CHOICES = {
    "weights": ("auto", "random"),
    "engine": ("auto", "yoke", "hf"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "kv_dtype": ("auto", "float32", "bfloat16", "float16", "int8"),
    "quant": ("auto", "none", *SCHEMES),
    "quant_head": HEADS,
    "activations": ("auto", "int8"),
    "output": ("text", "json"),
    "generation_config": ("auto", "none"),
}


def parse_job(words: Sequence[str], need_prompt: bool = True) -> Job:
    """Read `key=value` words. Raises InputError that names the key."""
    values: dict[str, str | None] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise InputError(f"{word!r} is not a flag, a command or key=value; see --help")
        if key not in KEYS:
            raise InputError(f"unknown key {key!r}{nearest(key, list(KEYS))}; see --help for all keys")
        values[key] = text
    if not values.get("model"):
        raise InputError(f"model= is missing: {HELP['model']}")
    if need_prompt and not (values.get("prompt") or values.get("prompts")):
        raise InputError(f"prompt= is missing: {HELP['prompt']}; prompts= {HELP['prompts']}")
    if values.get("prompt") and values.get("prompts"):
        raise InputError("prompt= and prompts= are both given; one of them says what to continue")
    job = replace(_typed(values), given=tuple(values))
    if "max_new_tokens" not in values:
        job = replace(job, max_new_tokens=max(1, min(job.max_new_tokens, job.max_seq_len - 1)))
    _check_values(job)
    if "quant_head" in values and job.quant not in SCHEMES:
        raise InputError(
            f"quant_head={job.quant_head} goes with a scheme for the layers, and quant={job.quant} is "
            f"none; leave quant_head= out, or add quant= with one of {', '.join(SCHEMES)}"
        )
    return job


def _typed(values: dict[str, str | None]) -> Job:
    """Give the words their keys' types. Texts are taken as they are: a prompt may look like YAML, or
    like one of OmegaConf's ${interpolations}, and means neither."""
    texts = {key: value for key, value in values.items() if key in _TEXTS}
    for key in ("prompt", "stop"):
        if texts.get(key):
            texts[key] = _in_utf8(key, str(texts[key]))
    typed = OmegaConf.structured(Job)
    OmegaConf.set_readonly(typed, False)
    for key, value in values.items():
        if key in texts:
            continue
        try:
            if value is not None and "${" in value:
                raise ValueError(value)
            OmegaConf.update(typed, key, None if value in ("", "null") else value)
        except (OmegaConfBaseException, ValueError) as error:
            raise InputError(f"{key}={value}: must be of type {_TYPES[key]}") from error
    others = {key: getattr(typed, key) for key in KEYS if key not in texts}
    return Job(**(others | texts))


def _in_utf8(key: str, word: str) -> str:
    """What is read by the model, whatever the locale is: python marks the bytes that it cannot decode.
    Paths stay as they are, since they go back to the system that way. Raises InputError."""
    if word.isascii() or not any("\udc80" <= character <= "\udcff" for character in word):
        return word
    try:
        return os.fsencode(word).decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise InputError(f"{key}= is not text in UTF-8 ({error.reason})") from error


def _check_values(job: Job) -> None:
    for key, choices in _CHOICES.items():
        value = getattr(job, key)
        if value not in choices:
            raise InputError(
                f"{key}={value}: must be one of {', '.join(choices)}{nearest(value, list(choices))}"
            )
    limits: tuple[tuple[str, float, float], ...] = (
        ("max_new_tokens", 1, 1 << 24),
        ("max_seq_len", 2, 1 << 24),
        ("batch", 0, 1024),
        ("check_every", 1, 1 << 16),
        ("num_beams", 1, 64),
        ("length_penalty", -10.0, 10.0),
        ("draft_tokens", 1, 64),
    )
    for key, low, high in limits:
        value = getattr(job, key)
        if not low <= value <= high:  # also refuses nan
            raise InputError(f"{key}={value}: must be between {low} and {high}")
    if job.max_new_tokens >= job.max_seq_len:
        raise InputError(
            f"max_new_tokens={job.max_new_tokens} does not leave room for a prompt in "
            f"max_seq_len={job.max_seq_len}; raise max_seq_len"
        )
    check_sampling(sampling_of(job), None)
    stop_texts(job)
    _check_modes(job)


def _check_modes(job: Job) -> None:
    """Raise InputError for keys that do not go together."""
    check_beams(job, sampling_of(job))
    if job.num_beams > 1:
        for key, given in (
            ("draft", bool(job.draft)),
            ("stop", bool(job.stop)),
            ("engine", job.engine == "hf"),
        ):
            if given:
                raise InputError(_not_with_beams(job, key, getattr(job, key)))
    if job.draft and job.engine == "hf":
        raise InputError(f"draft={job.draft} does not go with engine=hf; leave one of the two out")
    if job.activations == "int8" and job.quant not in ("auto", "int8"):
        raise InputError(
            f"activations=int8 goes with weights of 8 bits, and not with quant={job.quant}; use "
            "quant=int8"
        )
    if job.quant in SCHEMES:
        own = dtype_name(job.dtype, job.device)
        if job.engine == "hf":
            raise InputError(
                f"quant={job.quant} does not go with engine=hf, whose layers hold weights as they are; "
                "leave one of the two out"
            )
        if own != "bfloat16":
            raise InputError(
                f"quant={job.quant} goes with dtype=bfloat16, in which quantized weights are "
                f"multiplied, and not with dtype={own}; add dtype=bfloat16"
            )
    kv_dtype_name(job.kv_dtype, job.dtype, job.device)
    if job.kv_dtype != "auto" and job.engine == "hf":
        raise InputError(f"kv_dtype={job.kv_dtype} does not go with engine=hf, which keeps dtype=")


def fitted_length(job: Job, limit: int | None, stretched_from: int | None = None) -> int:
    """The job's max_seq_len for a model that was trained for `limit` tokens (None: nobody knows) and
    rotates all texts otherwise where there is room for more than `stretched_from`. What nobody gave is
    lowered to that. Raises InputError for what was given and cannot be had."""
    if "max_seq_len" not in job.given:
        return min([job.max_seq_len, *(length for length in (limit, stretched_from) if length)])
    if limit is not None and job.max_seq_len > limit:
        raise InputError(
            f"max_seq_len={job.max_seq_len}: this model was trained for {limit} at most; give no more"
        )
    return job.max_seq_len


def quant_of(job: Job) -> str:
    """What the loader is told (`models.load_quant`)."""
    return f"{job.quant}/{job.quant_head}" if job.quant in SCHEMES else job.quant


def check_beams(job: Job, sampling: Sampling) -> None:
    """Raise InputError for sampling that does not go with the job's beams, if it has any."""
    if job.num_beams == 1 or sampling.is_plain:
        return
    plain = Sampling()
    for key in (
        "temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
        "logprobs",
    ):  # fmt: skip
        value = getattr(sampling, key)
        if value != getattr(plain, key):
            if key == "logit_bias":
                value = ",".join(f"{token}:{bias:g}" for token, bias in value)
            raise InputError(_not_with_beams(job, key, value))


def _not_with_beams(job: Job, key: str, value: object) -> str:
    return (
        f"num_beams={job.num_beams} does not go with {key}={value}: a beam search compares texts of "
        "our own models by their log-probabilities as they are, up to a stop token; leave one of the "
        "two out"
    )


def sampling_of(job: Job) -> Sampling:
    """How the job's tokens are chosen. Raises InputError for a logit_bias that cannot be read."""
    names = (field.name for field in fields(Sampling) if field.name != "logit_bias")
    return Sampling(**{name: getattr(job, name) for name in names}, logit_bias=_biases(job.logit_bias))


def _biases(text: str) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [word.split(":") for word in text.split(",") if word.strip()]
        return tuple((int(token), float(bias)) for token, bias in pairs)
    except ValueError as error:
        raise InputError(
            f"logit_bias={text}: must be token numbers with what is added, such as 13:-100,50:2.5"
        ) from error


def stop_texts(job: Job) -> tuple[str, ...]:
    """The texts that end an answer. Raises InputError."""
    texts: object = [job.stop] if job.stop else []
    if job.stop.startswith("["):
        with suppress(ValueError, RecursionError):  # a text that begins with a bracket
            texts = json.loads(job.stop)
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"stop={job.stop}: must be a text, or a JSON list of texts that are not empty")
    return tuple(texts)
