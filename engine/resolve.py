"""Resolves a job before any rank starts: finds the model's dimensions and weights, reads the prompts.

Does not import torch. The launcher passes the result to the ranks with `to_json` and `from_json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from base.errors import InputError, nearest
from engine.generation import with_defaults
from engine.job import LOOKUP, Job
from engine.prompts import Prompt, prompt_from_dict, read_prompts
from models.config import OVERRIDES, ModelConfig, from_dict, override
from models.config_hf import from_hf
from models.fetch import obtain, obtain_config
from models.hf import config as hf_config
from models.presets import PRESETS
from models.quant_rules import Quant, ask, check_quant, quant_from_dict
from tp.heads import check_world_size
from weights.files import read_json


@dataclass(frozen=True)
class ResolvedJob:
    """A job and the model that was found for it. `checkpoint`: path of the weights, None for random
    ones. `config`: the dimensions, None if they are not known without opening the file. `quant`: what
    quant=, quant_head= and activations= ask for, None for quant=none. `draft`: the same for the draft
    model. `notes`: lines for the user that say which settings came from a file."""

    job: Job
    checkpoint: Path | None
    config: ModelConfig | None
    quant: Quant | None = None
    prompts: tuple[Prompt, ...] = ()
    draft: ResolvedJob | None = None
    notes: tuple[str, ...] = ()


def resolve(job: Job, sizing: bool = False, attended: bool = True) -> ResolvedJob:
    """Find the model's dimensions and weights, and read the prompts. `sizing`: only the dimensions are
    needed, and weights that are not here are not fetched. `attended`: a person at the terminal may be
    asked whether to fetch them. Raises InputError that says what is wrong and, for missing weights, how
    to get them."""
    found = _resolve_model(job, "model", sizing, attended)
    job, notes = with_defaults(job, found.checkpoint)
    found = replace(found, job=job, prompts=read_prompts(job), notes=(*found.notes, *notes))
    if job.draft in ("", LOOKUP):
        return found
    # quant= applies to the main model. A draft model keeps its file's quantization, unless quant=none.
    quant = "none" if job.quant == "none" else "auto"
    weights = _draft_weights(job)
    draft = replace(job, model=job.draft, draft="", weights=weights, engine="yoke", quant=quant)
    shapes: dict[str, Any] = dict.fromkeys(OVERRIDES)
    resolved = _resolve_model(replace(draft, **shapes), "draft", sizing, attended)
    _check_vocabularies(found, resolved)
    return replace(found, draft=resolved)


def _draft_weights(job: Job) -> str:
    return "random" if job.weights == "random" and job.draft in PRESETS else "auto"


def _check_vocabularies(found: ResolvedJob, draft: ResolvedJob) -> None:
    """Compare early where both sizes are known; the ranks compare them in any case."""
    if found.config is not None and draft.config is not None:
        check_draft(found.config.vocab_size, draft.config.vocab_size, found.job.draft)


def check_draft(vocab_size: int, draft_vocab_size: int, name: str) -> None:
    """Raise InputError unless the draft model's vocabulary has the size of the main model's."""
    if vocab_size != draft_vocab_size:
        raise InputError(
            f"draft={name}: it has a vocabulary of {draft_vocab_size} tokens, the main model one of "
            f"{vocab_size}; both must use the same tokenizer. draft=lookup needs no draft model"
        )


def _resolve_model(job: Job, key: str, sizing: bool, attended: bool) -> ResolvedJob:
    """`key`: the key of the command line that named `job.model`, for errors."""
    quant = _quant(job)
    overrides = {key: getattr(job, key) for key in OVERRIDES if getattr(job, key) is not None}
    preset = PRESETS.get(job.model)
    if job.engine == "hf":
        hf_config.require_transformers()
        if job.weights == "random":
            raise InputError("engine=hf has no presets: weights=random goes with engine=yoke")
    if job.weights == "random":
        if preset is None:
            raise InputError(
                f"{key}={job.model}: weights=random needs a preset, one of {', '.join(PRESETS)}"
                + nearest(job.model, list(PRESETS))
            )
        return ResolvedJob(job, None, override(preset, **overrides), quant)
    if overrides:
        raise InputError(
            f"{next(iter(overrides))}= changes the shape of the model, but its weights exist in one "
            "shape only; add weights=random"
        )
    others = (LOOKUP,) if key == "draft" else ()
    if sizing:
        return _sized(job, key, others)
    fetch = job.fetch if "fetch" in job.given else None
    found = obtain(job.model, key, others, fetch, attended)
    if job.engine == "hf":
        hf_config.check_folder(found)
        return ResolvedJob(job, found, None, quant)
    return ResolvedJob(job, found, _preset_of(job, found), quant)


def _sized(job: Job, key: str, others: Sequence[str]) -> ResolvedJob:
    """The job with its weights if they are here, else with the dimensions alone: a preset's, or those
    of a config.json. Raises InputError if there is neither."""
    quant = _quant(job)
    try:
        found = obtain(job.model, key, others, fetch=False)
        if job.engine == "hf":
            hf_config.check_folder(found)
            return ResolvedJob(job, found, None, quant)
        return ResolvedJob(job, found, _preset_of(job, found), quant)
    except InputError:
        file = obtain_config(job.model, job.fetch)
        if file is not None and job.engine != "hf":
            note = f"{key}={job.model}: its weights are not here; its sizes are those of {file}"
            return ResolvedJob(job, None, from_hf(read_json(file), str(file)), quant, notes=(note,))
        if job.model not in PRESETS or job.engine == "hf":
            raise
        note = f"{key}={job.model}: its weights are not here; its sizes are the preset's"
        return ResolvedJob(job, None, PRESETS[job.model], quant, notes=(note,))


def _preset_of(job: Job, found: Path) -> ModelConfig | None:
    """The preset's dimensions, for the file that is known to have them. A folder has its own."""
    return PRESETS.get(job.model) if found.is_file() else None


def _quant(job: Job) -> Quant | None:
    if job.quant == "none":
        return None
    asked = None if job.quant == "auto" else ask(job.quant, job.quant_head)
    return Quant(asked, round_prompts=job.activations == "int8")


def check_ranks(resolved: ResolvedJob, world_size: int) -> None:
    """Raise InputError if the model is known not to split over `world_size` ranks."""
    if resolved.config is not None:
        check_world_size(resolved.config.num_heads, world_size)
        if resolved.quant is not None and resolved.quant.asked is not None:
            check_quant(resolved.config, resolved.quant.asked, world_size)
    elif resolved.job.engine == "hf" and resolved.checkpoint is not None:
        hf_config.check_ranks(resolved.checkpoint, world_size)
    if resolved.draft is not None:
        try:
            check_ranks(resolved.draft, world_size)
        except InputError as error:
            raise InputError(f"draft={resolved.job.draft}: {error}") from error


def to_json(resolved: ResolvedJob) -> str:
    """Returns the job as JSON, for the ranks."""
    return json.dumps(_to_dict(resolved))


def from_json(text: str) -> ResolvedJob:
    """The inverse of `to_json`."""
    return _from_dict(json.loads(text))


def _to_dict(resolved: ResolvedJob) -> dict[str, Any]:
    return {
        "job": asdict(resolved.job),
        "checkpoint": None if resolved.checkpoint is None else str(resolved.checkpoint),
        "config": None if resolved.config is None else asdict(resolved.config),
        "quant": None if resolved.quant is None else asdict(resolved.quant),
        "prompts": [asdict(prompt) for prompt in resolved.prompts],
        "draft": None if resolved.draft is None else _to_dict(resolved.draft),
        "notes": resolved.notes,
    }


def _from_dict(data: dict[str, Any]) -> ResolvedJob:
    return ResolvedJob(
        job=Job(**data["job"] | {"given": tuple(data["job"]["given"])}),
        checkpoint=None if data["checkpoint"] is None else Path(data["checkpoint"]),
        config=None if data["config"] is None else from_dict(data["config"]),
        quant=None if data["quant"] is None else quant_from_dict(data["quant"]),
        prompts=tuple(prompt_from_dict(prompt) for prompt in data["prompts"]),
        draft=None if data["draft"] is None else _from_dict(data["draft"]),
        notes=tuple(data["notes"]),
    )
