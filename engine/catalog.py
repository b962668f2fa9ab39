"""The presets, and the memory that each needs on 1, 2, 4 and 8 ranks: data for `launch.py models`.

Returns a dictionary that programs can read; `launcher.models_view` prints it for people. Not here:
where the ranks would run on a machine (`launch.py plan model=...` shows that for one model).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from base.errors import InputError
from engine.dtypes import dtype_name
from engine.job import parse_job
from engine.memory import Workload, rank_needs
from models.config import ModelConfig
from models.families import FAMILIES, Family, family_of
from models.find import cached_models, holds_weights, look_for
from models.hub import REPOSITORIES
from models.presets import PRESETS
from models.sizes import num_active_parameters, num_parameters

WORLD_SIZES = (1, 2, 4, 8)
KEYS = ("max_seq_len", "dtype")


def catalog(
    names: Sequence[str] = (),
    given: Mapping[str, str] = MappingProxyType({}),
    world_sizes: Sequence[int] = WORLD_SIZES,
    machine_bytes: int | None = None,
) -> dict[str, Any]:
    """Returns families and their presets, with sizes and memory needs in bytes.

    `names` narrow the list: names, prefixes, or patterns with *. `given` may have the keys
    `max_seq_len` and `dtype`, as for a job. Raises InputError for a name that matches no preset.

    For each model and world size: `largest_rank`, what the largest rank holds by purpose; `total_bytes`
    of all ranks; `fits`, whether that fits `machine_bytes` (None if not known). Or `refused`: why the
    model cannot run on that many ranks. `here`: where its weights are, None if they are not here.
    """
    for key, text in given.items():
        if key not in KEYS:
            raise InputError(f"models takes {'= and '.join(KEYS)}=, not {f'{key}={text}'!r}")
    # Checked like a job; the model and max_new_tokens are placeholders.
    job = parse_job({"model": "tiny", "max_new_tokens": "1", **given}, need_prompt=False)
    chosen = select(names)
    models = [
        _describe(name, job.dtype, job.max_seq_len, world_sizes, machine_bytes) for name in chosen
    ]
    families = [family for family in FAMILIES if any(family_of(name) is family for name in chosen)]
    return {
        "max_seq_len": job.max_seq_len,
        "dtype": dtype_name(job.dtype),
        "machine_bytes": machine_bytes,
        "cached": []
        if names
        else [name for name in cached_models() if name not in REPOSITORIES.values()],
        "families": [_describe_family(family) for family in families],
        "models": models,
    }


def select(names: Sequence[str]) -> list[str]:
    """Returns the presets that `names` match, grouped by family; all presets if `names` is empty.
    Raises InputError for a name that matches none."""
    found: set[str] = set()
    for name in names:
        wanted = name.lower()
        if wanted in PRESETS:
            found.add(wanted)
            continue
        pattern = wanted if any(c in wanted for c in "*?[") else f"{wanted}*"
        matching = [preset for preset in PRESETS if fnmatchcase(preset, pattern)]
        if not matching:
            close = difflib.get_close_matches(wanted, PRESETS, n=3, cutoff=0.4)
            hint = f"the nearest: {', '.join(close)}; " if close else ""
            raise InputError(f"no model is called {name!r}; {hint}all: python launch.py models")
        found.update(matching)
    chosen = [preset for preset in PRESETS if preset in found or not names]
    return sorted(chosen, key=lambda preset: FAMILIES.index(family_of(preset)))


def _describe(
    name: str, dtype: str, max_seq_len: int, world_sizes: Sequence[int], machine_bytes: int | None
) -> dict[str, Any]:
    config, parameters = PRESETS[name], num_parameters(PRESETS[name])
    return {
        "name": name,
        "family": family_of(name).name,
        "repository": REPOSITORIES.get(name),
        "here": _where(name),
        "parameters": parameters,
        "active_parameters": num_active_parameters(config),
        "bfloat16_bytes": 2 * parameters,
        "max_seq_len": config.max_seq_len,
        "ranks": {
            str(size): _needs(config, dtype, max_seq_len, size, machine_bytes) for size in world_sizes
        },
    }


def _where(name: str) -> str | None:
    try:
        found = look_for(name)
    except InputError:  # another revision
        return None
    return None if found is None or (found.is_dir() and not holds_weights(found)) else str(found)


def _needs(
    config: ModelConfig, dtype: str, max_seq_len: int, world_size: int, machine_bytes: int | None
) -> dict[str, Any]:
    if max_seq_len > config.max_seq_len:
        return {"refused": f"trained for {config.max_seq_len} tokens at most; lower max_seq_len"}
    try:
        needs = [
            rank_needs(config, Workload(dtype, max_seq_len), r, world_size) for r in range(world_size)
        ]
    except InputError as error:
        return {"refused": str(error)}
    total = sum(sum(need.values()) for need in needs)
    return {
        "largest_rank": max(needs, key=lambda need: sum(need.values())),
        "total_bytes": total,
        "fits": None if machine_bytes is None else total <= machine_bytes,
    }


def _describe_family(family: Family) -> dict[str, Any]:
    return {
        "name": family.name,
        "block": family.block,
        "config_json": family.hf,
        "gguf": family.read_gguf or None,
        "what": family.what,
    }
