"""Takes a job's sampling defaults from the model's generation_config.json. Does not import torch.

The file is read as transformers' `generate()` reads it: the user's values override the file's, and the
file's override the library's. The file's temperature counts only if it samples (`do_sample`); then
top_k is 50 unless the file sets it. Penalties and suppressed tokens always count. A setting that would
change a text but is not supported is reported. Not taken from the file: lengths, which the job sets
(`max_new_tokens=`), and stop tokens, which the tokenizer has (`models.tokenizer.from_folder`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from base.errors import InputError
from engine.job import Job, check_beams, sampling_of, stop_texts
from models.sampling_params import Sampling, check_sampling
from weights.files import read_json
from weights.locate import locate

FILE = "generation_config.json"
_PENALTIES = ("repetition_penalty",)
_LIMITS = ("top_k", "top_p", "min_p")
_LIBRARYS_TOP_K = 50  # transformers' default, where a file samples and does not set it
# Settings that are not supported, each with the value at which it has no effect.
_UNKNOWN: dict[str, Any] = {
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_decoder_ids": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "sequence_bias": None,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}


def with_defaults(job: Job, checkpoint: Path | None) -> tuple[Job, tuple[str, ...]]:
    """Returns the job with the defaults of the file beside its weights, and lines for the user that say
    so. Raises InputError for a bad value."""
    file = None if checkpoint is None else _beside(checkpoint)
    if job.generation_config == "none" or file is None:
        return job, ()
    settings = {key: value for key, value in read_json(file).items() if value is not None}
    try:
        found, left = _taken(settings, job), _left(settings, job)
        changed = replace(job, **found)
        sampling = sampling_of(changed)
        check_sampling(sampling, None)
        check_beams(changed, sampling)
        stop_texts(changed)
    except InputError as error:
        raise InputError(
            f"{error} (from {file}; generation_config=none leaves its settings out)"
        ) from error
    lines = []
    shown = [
        f"{key}={value if key != 'logit_bias' else _shortened(value)}"
        for key, value in found.items()
        if value != getattr(job, key) and (key not in _LIMITS or changed.temperature > 0)
    ]
    if shown:
        lines.append(f"taken from {FILE}: {', '.join(shown)}; generation_config=none leaves them out")
    if left:
        lines.append(
            f"{FILE} has settings that are not supported and are left out, so texts may differ from "
            f"transformers': {', '.join(left)}"
        )
    return changed, tuple(lines)


def _beside(checkpoint: Path) -> Path | None:
    """The file that belongs to a checkpoint, None if there is none. Of a GGUF file, a
    generation_config.json beside it is ignored: GGUF files describe themselves."""
    source = locate(checkpoint)
    file = source.folder / FILE
    return file if source.form != "gguf" and file.is_file() else None


def _taken(settings: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The job's keys that the file sets, except those that the user gave."""
    sampled = settings.get("do_sample") is True
    defaults: dict[str, Any] = {"temperature": 1.0, "top_k": _LIBRARYS_TOP_K} if sampled else {}
    keys = (*(["temperature"] if sampled else []), *_LIMITS, *_PENALTIES)
    known = {key: value for key in keys if (value := settings.get(key, defaults.get(key))) is not None}
    samples = job.temperature > 0 or bool(known.get("temperature"))
    found: dict[str, Any] = {
        key: _number(key, value)
        for key, value in known.items()
        if key not in job.given and (samples or key not in _LIMITS or _usable(key, value))
    }
    if banned := _banned(settings):
        # Added to the user's biases, which override them.
        biased = {token for token, _ in sampling_of(job).logit_bias}
        bans = [f"{token}:-inf" for token in banned if token not in biased]
        found["logit_bias"] = ",".join([*bans, *filter(None, [job.logit_bias])])
    stops = settings.get("stop_strings")
    if stops and "stop" not in job.given and job.num_beams == 1:
        found["stop"] = json.dumps([stops] if isinstance(stops, str) else stops)
    return found


def _number(key: str, value: Any) -> float | int:
    """`value`, if it is a number of the key's type. Its range is checked later, with all others."""
    whole = key == "top_k"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise InputError(f"{key}={str(value)[:40]} must be a {'whole ' if whole else ''}number")
    return value if whole else float(value)


def _usable(key: str, value: Any) -> bool:
    """Whether a limit (top_k, top_p, min_p) has a valid value. Invalid ones are ignored for greedy
    jobs."""
    try:
        values: dict[str, Any] = {key: _number(key, value)}
        check_sampling(Sampling(**values), None)
    except InputError:
        return False
    return True


def _banned(settings: Mapping[str, Any]) -> list[int]:
    """The tokens that must never be chosen: suppressed tokens, and bad words of one token."""
    suppressed = settings.get("suppress_tokens", [])
    words = settings.get("bad_words_ids", [])
    eos = settings.get("eos_token_id", [])
    ends = eos if isinstance(eos, list) else [eos]
    try:
        found = {*suppressed, *(word[0] for word in words if len(word) == 1 and word[0] not in ends)}
        if any(type(token) is not int for token in found):
            raise TypeError(found)
    except (TypeError, KeyError) as error:
        raise InputError(
            f"suppress_tokens={str(suppressed)[:40]} must be a list of token ids, and "
            f"bad_words_ids={str(words)[:40]} a list of such lists"
        ) from error
    return sorted(token for token in found if token >= 0)


def _left(settings: Mapping[str, Any], job: Job) -> list[str]:
    """The settings that would change a text and are not supported."""
    left = [
        f"{key}={str(settings[key])[:40]}"
        for key, neutral in _UNKNOWN.items()
        if key in settings and settings[key] != neutral and key not in job.given
    ]
    if any(len(word) > 1 for word in settings.get("bad_words_ids", [])):
        left.append("bad_words_ids of several tokens")
    return left


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
