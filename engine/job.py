"""The settings of a generation job: parses and checks the `key=value` words of the command line.

Does not import torch: the launcher checks a job before it starts any rank, and passes the result to
the ranks as JSON. OmegaConf checks the types, so the error for `max_new_tokens=ten` names the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from base.errors import InputError, nearest
from engine.dtypes import dtype_name, kv_dtype_name
from models.sampling_params import Sampling, check_sampling
from weights.schemes import HEADS, SCHEMES

LOOKUP = "lookup"  # the value of draft= that needs no model


@dataclass(frozen=True)
class Job:
    """The keys, their types and their defaults. Lengths are in tokens. `given` is not a key: it lists
    the keys that the user gave. The values of all other keys may be adapted to the model."""

    model: str = MISSING
    prompt: str = ""
    prompts: str = ""
    weights: str = "auto"
    fetch: bool = False
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
    compile: str = "auto"
    chat: bool = False
    output: str = "text"
    # Dimensions that override a preset, to try the shape of a large model quickly.
    dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    vocab_size: int | None = None
    given: tuple[str, ...] = ()


KEYS = tuple(field.name for field in fields(Job) if field.name != "given")
HELP: dict[str, str] = {
    "model": "a preset, a .gguf file, a folder of safetensors, OWNER/NAME or OWNER/NAME:FILE.gguf",
    "prompt": "the text to continue",
    "prompts": "or a file of them, one per line or JSON lines; - is standard input",
    "weights": "auto (find them) or random (the shape of a preset, without weights)",
    "fetch": "download a model that is not here from the hub; a terminal asks",
    "engine": "auto or yoke (our models), hf (any with a plan in the transformers library)",
    "device": "auto (what the ranks are placed on), cpu or cuda",
    "max_new_tokens": "how many tokens to generate at most",
    "max_seq_len": "length of prompt and answer together, in tokens; lowered to the model's limit",
    "batch": "prompts decoded at once; 0: up to 8, as prompts and memory allow",
    "dtype": "auto, float32, bfloat16 or float16; kv_dtype= sets the KV cache's, also int8",
    "quant": "auto (keep weights that the file has quantized), none, or to: " + ", ".join(SCHEMES),
    "quant_head": "the LM head, where quant= names a scheme: int8, same (as quant=) or none",
    "activations": "int8 quantizes a prompt's activations where weights are int8: faster with AMX",
    "temperature": "0 is greedy; to limit the choice: top_k= [0], top_p= [1], min_p= [0]",
    "logit_bias": "ID:BIAS,... is added to logits, -inf bans; repetition_penalty= [1], "
    "presence_penalty= and frequency_penalty= [0]",
    "logprobs": "with output=json: log-probabilities of each token and of the top N",
    "seed": "for sampling, and for random weights",
    "stop": 'a string that ends the answer, or a JSON list of strings: ["a", "b"]',
    "generation_config": "auto (sampling defaults from the model's generation_config.json) or none",
    "check_every": "steps between two checks for finished sequences",
    "num_beams": "width of the beam search; 1: no beam search. length_penalty= [1]",
    "draft": "propose tokens: lookup (in the text so far) or a small model; draft_tokens= [4]",
    "compile": "auto (start at once, and compile during the run), true (wait for it) or false",
    "chat": "wrap the prompt in the model's chat template",
    "output": "text (streamed) or json (an object for each prompt)",
    "num_layers": "with weights=random: overrides the preset; likewise dim, num_heads, "
    "num_kv_heads, ffn_dim, vocab_size",
}


def help_lines() -> list[str]:
    """Returns the help text of the keys, one line for each."""
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
    "compile": ("auto", "true", "false"),
    "output": ("text", "json"),
    "generation_config": ("auto", "none"),
}


def parse_job(values: Mapping[str, str], need_prompt: bool = True) -> Job:
    """Parse and check the texts of the keys that were given. Raises InputError that names the key.
    `need_prompt`: also without a prompt."""
    for key in values:
        if key not in KEYS:
            raise InputError(f"unknown key {key!r}{nearest(key, list(KEYS))}; see --help for all keys")
    if not values.get("model"):
        raise InputError(f"model= is missing: {HELP['model']}")
    if need_prompt and not (values.get("prompt") or values.get("prompts")):
        raise InputError(f"prompt= is missing: {HELP['prompt']}; prompts= {HELP['prompts']}")
    if values.get("prompt") and values.get("prompts"):
        raise InputError("prompt= and prompts= are both given; leave one of the two out")
    job = replace(_typed(values), given=tuple(values))
    if "max_new_tokens" not in values:
        job = replace(job, max_new_tokens=max(1, min(job.max_new_tokens, job.max_seq_len - 1)))
    _check_values(job)
    if "quant_head" in values and job.quant not in SCHEMES:
        raise InputError(
            f"quant_head={job.quant_head} needs a scheme for the layers, and quant={job.quant} names "
            f"none; leave quant_head= out, or add quant= with one of {', '.join(SCHEMES)}"
        )
    return job


def _typed(values: Mapping[str, str]) -> Job:
    """Convert the values to their keys' types. Strings are taken literally: a prompt may look like YAML
    or like an OmegaConf ${interpolation}, but is neither."""
    texts = {key: value for key, value in values.items() if key in _TEXTS}
    for key in ("prompt", "stop"):
        if texts.get(key):
            texts[key] = _in_utf8(key, texts[key])
    typed = OmegaConf.structured(Job)
    OmegaConf.set_readonly(typed, False)
    for key, value in values.items():
        if key in texts:
            continue
        try:
            if "${" in value:
                raise ValueError(value)
            OmegaConf.update(typed, key, None if value in ("", "null") else value)
        except (OmegaConfBaseException, ValueError) as error:
            raise InputError(f"{key}={value}: must be of type {_TYPES[key]}") from error
    others = {key: getattr(typed, key) for key in KEYS if key not in texts}
    return Job(**(others | texts))


def _in_utf8(key: str, word: str) -> str:
    """Decode text for the model as UTF-8, whatever the locale is: Python marks bytes that it could not
    decode by surrogates. Paths are not converted, since the system takes them back with these marks.
    Raises InputError for bytes that are not UTF-8."""
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
            f"max_seq_len={job.max_seq_len}; raise max_seq_len or lower max_new_tokens"
        )
    check_sampling(sampling_of(job), None)
    stop_texts(job)
    _check_modes(job)


def _check_modes(job: Job) -> None:
    """Raise InputError for keys that do not go together."""
    check_beams(job, sampling_of(job))
    check_shown(job, job.logprobs)
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
            f"activations=int8 needs int8 weights and does not go with quant={job.quant}; "
            "use quant=int8"
        )
    if job.quant in SCHEMES:
        own = dtype_name(job.dtype, job.device)
        if job.engine == "hf":
            raise InputError(
                f"quant={job.quant} does not go with engine=hf, which does not quantize weights; "
                "leave one of the two out"
            )
        if own != "bfloat16":
            raise InputError(
                f"quant={job.quant} does not go with dtype={own}: the kernels for quantized weights "
                "compute in bfloat16; add dtype=bfloat16"
            )
    kv_dtype_name(job.kv_dtype, job.dtype, job.device)
    if job.kv_dtype != "auto" and job.engine == "hf":
        raise InputError(
            f"kv_dtype={job.kv_dtype} does not go with engine=hf, whose cache has the dtype of dtype=; "
            "leave one of the two out"
        )


def fitted_length(job: Job, limit: int | None, stretched_from: int | None = None) -> int:
    """Returns the job's max_seq_len, in tokens, for a model that was trained for `limit` tokens (None:
    not known). A max_seq_len above `stretched_from` changes the rotary embedding of all texts. A
    default is lowered to both. Raises InputError if the user gave more than `limit`."""
    if "max_seq_len" not in job.given:
        return min([job.max_seq_len, *(length for length in (limit, stretched_from) if length)])
    if limit is not None and job.max_seq_len > limit:
        raise InputError(
            f"max_seq_len={job.max_seq_len}: this model was trained for {limit} at most; lower it"
        )
    return job.max_seq_len


def check_shown(job: Job, logprobs: int) -> None:
    """Raise InputError if log-probabilities are asked for (0 or more), and the output cannot show
    them."""
    if logprobs >= 0 and job.output != "json":
        raise InputError(
            f"logprobs={logprobs} is shown only with output=json, and output={job.output} would leave "
            "them out; add output=json, or leave logprobs= out"
        )


def check_beams(job: Job, sampling: Sampling) -> None:
    """Raise InputError if the job is a beam search and `sampling` is not the default."""
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
        f"num_beams={job.num_beams} does not go with {key}={value}: a beam search runs only with "
        "engine=yoke, compares texts by their unchanged log-probabilities, and ends them only at stop "
        "tokens; leave one of the two out"
    )


def sampling_of(job: Job) -> Sampling:
    """Returns the job's sampling settings. Raises InputError for a logit_bias that cannot be parsed."""
    names = (field.name for field in fields(Sampling) if field.name != "logit_bias")
    return Sampling(**{name: getattr(job, name) for name in names}, logit_bias=_biases(job.logit_bias))


def _biases(text: str) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [word.split(":") for word in text.split(",") if word.strip()]
        return tuple((int(token), float(bias)) for token, bias in pairs)
    except ValueError as error:
        raise InputError(
            f"logit_bias={text}: must be a list of TOKEN_ID:BIAS, such as 13:-100,50:2.5"
        ) from error


def stop_texts(job: Job) -> tuple[str, ...]:
    """Returns the stop strings, which end an answer. Raises InputError if stop= is not a string or a
    JSON list of non-empty strings."""
    texts: object = [job.stop] if job.stop else []
    if job.stop.startswith("["):
        with suppress(ValueError, RecursionError):  # not JSON: a stop string that begins with a bracket
            texts = json.loads(job.stop)
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"stop={job.stop}: must be a string, or a JSON list of non-empty strings")
    return tuple(texts)
