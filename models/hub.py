"""The hub's names: which repository holds a preset, and which of a repository's files a model needs.

Pure functions of names, free of torch and of the hub's library. What is not here: what is in the local
cache (`models.find`), and how files get there (`models.fetch`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from base.errors import InputError
from weights.locate import is_companion, shards_of

# The instruction-tuned model where there is one, as chat needs it.
REPOSITORIES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "llama-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama-70b": "meta-llama/Llama-2-70b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-4": "microsoft/phi-4",
    "granite-3.1-2b": "ibm-granite/granite-3.1-2b-instruct",
    "granite-3.1-8b": "ibm-granite/granite-3.1-8b-instruct",
    "gemma-2-2b": "google/gemma-2-2b-it",
    "gemma-2-9b": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b-it",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "gemma-3-12b": "google/gemma-3-12b-it",
    "gemma-3-27b": "google/gemma-3-27b-it",
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
    "falcon-7b": "tiiuae/falcon-7b-instruct",
    "falcon-40b": "tiiuae/falcon-40b-instruct",
}

# Config, tokenizer, chat templates. A GGUF file contains its own.
_SMALL = (
    "config.json", "generation_config.json", "quantize_config.json", "quant_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates/"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_MOST_NAMED = 12  # files in a message


@dataclass(frozen=True)
class Reference:
    """A repository of the hub, OWNER/NAME, and the GGUF file in it that is meant: its name, a pattern,
    or a part of its name that no other has. `file` is "" for a repository in any other format."""

    repository: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.repository}:{self.file}" if self.file else self.repository


@dataclass(frozen=True)
class Needed:
    """The files of a repository that a model needs. `index`: the one of the small files that names the
    weights, "" if there is none; then `weights` are those that belong to it by their names."""

    small: tuple[str, ...]
    weights: tuple[str, ...]
    index: str = ""


def reference_of(model: str) -> Reference | None:
    """What `model=` means on the hub: a preset's repository, OWNER/NAME or OWNER/NAME:FILE; None if it
    cannot be any of them."""
    name, colon, file = REPOSITORIES.get(model, model).partition(":")
    if not _NAME.fullmatch(name) or (colon and not file) or ".." in name:
        return None
    return Reference(name, file)


def choose_files(names: Sequence[str], reference: Reference) -> Needed:
    """The files that are needed, of all in the repository. Raises InputError if there are no weights in
    a format that Yoke reads, or if it is not clear which."""
    if reference.file:
        return Needed((), choose_gguf(names, reference))
    top = [name for name in names if "/" not in name and not is_companion(name)]
    small = [name for name in names if name in _SMALL or _is_template(name)]
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole = f"{stem}{suffix}"
        shards = [name for name in top if (shards_of(name) or "").startswith(f"{stem}-*")]
        shards = [name for name in shards if name.endswith(suffix)]
        if (index := f"{whole}.index.json") in top and shards:
            return Needed((*small, index), tuple(shards), index)
        if whole in top:
            return Needed(tuple(small), (whole,))
        others = [name for name in top if suffix == ".safetensors" and name.endswith(suffix)]
        # Mistral's releases hold the same weights a second time, under Meta's names.
        others = [name for name in others if not name.startswith("consolidated")] or others
        if weights := shards or others:
            return Needed(tuple(small), tuple(weights))
    if meta := [name for name in top if re.fullmatch(r"consolidated\.\d+\.pth", name)]:
        return Needed((*small, *({"params.json"} & set(top))), tuple(meta))
    if any(name.endswith(".gguf") for name in top):
        return Needed((), choose_gguf(top, reference))
    raise InputError(
        f"{reference} on the hub holds no weights in a format that Yoke reads (safetensors, GGUF, "
        f"pytorch_model.bin, Meta's consolidated.00.pth); it holds {_listed(names) or 'no files'}"
    )


def choose_gguf(names: Sequence[str], reference: Reference) -> tuple[str, ...]:
    """The GGUF file that is meant, or all parts of it if it is split. Raises InputError if none or
    several fit."""
    fitting = match_gguf(names, reference)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if not fitting:
        there = _listed(_gguf_sets(names)) or "no GGUF file"
        raise InputError(
            f"no GGUF file of {reference.repository} is named {reference.file!r}; it holds {there}"
        )
    raise InputError(
        f"{str(reference)!r} could mean {len(fitting)} GGUF files: {_listed(fitting)}; name one, such "
        f"as {reference.repository}:{min(fitting, key=len).rpartition('/')[2]}"
    )


def match_gguf(names: Iterable[str], reference: Reference) -> dict[str, tuple[str, ...]]:
    """The GGUF files that could be meant, with the parts of each, by a name that all parts share."""
    wanted = reference.file.lower()
    pattern = wanted if any(c in wanted for c in "*?[") else f"*{wanted}*"
    sets = _gguf_sets(names)
    exact = {
        name: files
        for name, files in sets.items()
        if any(wanted in (file.lower(), file.lower().rpartition("/")[2]) for file in (name, *files))
    }
    return exact or {
        name: files
        for name, files in sets.items()
        if any(fnmatchcase(file.lower(), pattern) for file in (name, *files))
    }


def _gguf_sets(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    sets: dict[str, tuple[str, ...]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and not is_companion(name.rpartition("/")[2]):
            shared = shards_of(name) or name
            sets[shared] = (*sets.get(shared, ()), name)
    return sets


def _is_template(name: str) -> bool:
    rest = name.removeprefix(_TEMPLATES)
    return rest != name and rest.endswith(".jinja") and "/" not in rest


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - _MOST_NAMED
    return ", ".join(found[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
