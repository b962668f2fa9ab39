"""Checks of a model for `engine=hf` (which runs transformers) that are possible before torch is loaded.

Free of torch and of transformers: the command refuses a missing package, an unsupported path or too
many ranks before any rank is started.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.errors import InputError
from tp.heads import check_world_size
from weights.files import read_json
from weights.locate import locate_in
from weights.nested import is_nested

# The first release whose caches report the positions of the queries (`get_query_offset`), from which
# `models.hf.attention` makes the masks.
OLDEST = (5, 23)
_MOST_LAYERS = 4096


def require_transformers() -> None:
    """Raise InputError unless transformers is installed and new enough. Does not import it."""
    needed = ".".join(map(str, OLDEST))
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"engine=hf needs the package transformers, which is not installed; "
            f"run: pip install 'transformers>={needed}'"
        ) from None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise InputError(
            f"engine=hf needs transformers {needed} or newer, and {version} is installed; "
            f"run: pip install 'transformers>={needed}'"
        )


def check_folder(path: Path) -> None:
    """Raise InputError unless `path` is a folder as transformers saves it, with config.json and
    safetensors, of a model for text only."""
    found = locate_in(path) if path.is_dir() else None
    if not (path / "config.json").is_file() or found is None or found.form != "safetensors":
        raise InputError(
            f"engine=hf reads a folder with config.json and *.safetensors, and {path} is not one; "
            "give such a folder, or leave engine= out"
        )
    config = read_json(path / "config.json")
    if is_nested(config):
        raise InputError(
            f"engine=hf runs classes for text only, and {path} holds a model of type "
            f"{config['model_type']!r}, with a text model inside; leave engine= out to run that"
        )


def declared_heads(config: Mapping[str, Any]) -> int | None:
    """The number of query heads that a config.json declares; None if no usual key declares it."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("num_attention_heads", "n_head", "n_heads"):
            heads = place.get(key)
            if type(heads) is int and heads >= 1:
                return heads
    return None


def check_layers(folder: Path) -> None:
    """Raise InputError for a config.json with more layers than any model has: the library builds lists
    and modules for them, which takes time and memory even without weights."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            layers = place.get(key)
            if type(layers) is int and layers > _MOST_LAYERS:
                raise InputError(
                    f"{folder / 'config.json'}: {key}={layers}, but at most {_MOST_LAYERS} are "
                    "allowed; download it again"
                )


def check_ranks(folder: Path, world_size: int) -> None:
    """Raise InputError if the model in a folder has fewer query heads than there are ranks."""
    heads = declared_heads(read_json(folder / "config.json"))
    if heads is not None:
        check_world_size(heads, world_size)
