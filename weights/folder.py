"""What formats in Hugging Face's manner share: several files as one, and a config beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weights.checkpoint import Checkpoint, Entry
from weights.errors import InputError
from weights.files import read_json
from weights.names import Piece, translate
from weights.params import hf_config
from weights.quant_hf import with_quantised
from weights.views import present


def gather(
    source: Path, files: Iterable[Path] | Mapping[str, str], read: Callable[[Path], dict[str, Entry]]
) -> dict[str, Entry]:
    """The tensors of several files, or of those that the index `source` names beside it. Raises
    InputError for a tensor that is stored twice, or is not where the index says."""
    index = files if isinstance(files, Mapping) else None
    if index is not None:
        files = [source.parent / name for name in sorted(set(index.values()))]
    entries: dict[str, Entry] = {}
    found_in: dict[str, str] = {}
    for file in files:
        assert isinstance(file, Path)
        for name, entry in read(file).items():
            if name in entries:
                raise InputError(
                    f"{name!r} is stored twice, in {found_in[name]} and in {file}; "
                    "remove the files that do not belong to the model"
                )
            entries[name], found_in[name] = replace(entry, file=file), file.name
    for name, file_name in (index or {}).items():
        if found_in.get(name) != file_name:
            raise InputError(
                f"{source} says that {name!r} is in {file_name!r}, which does not hold it; "
                "download the model again"
            )
    return entries


def assemble(
    path: Path,
    form: str,
    stored: Mapping[str, Entry],
    world_size: int = 1,
    names: Callable[[str], tuple[Piece, ...]] = translate,
) -> Checkpoint:
    """The checkpoint of what `path` stores, with the config beside it. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    config = config_beside(folder, {name: entry.shape for name, entry in stored.items()})
    stored = with_quantised(stored, config, str(folder / "config.json"))
    return present(path, form, stored, names, config, lambda: _heads(config, path), world_size)


def config_beside(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`config.json`, or else Meta's `params.json` in its terms. Raises InputError."""
    params = folder / "params.json"
    if not (folder / "config.json").exists() and params.exists():
        return hf_config(read_json(params), shapes, params)
    return read_json(folder / "config.json")


def _heads(config: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """How many query and KV heads a config declares. Raises InputError."""
    num_q = config.get("num_attention_heads")
    num_kv = config.get("num_key_value_heads") or num_q
    if config.get("architectures") == ["FalconForCausalLM"]:
        new = config.get("new_decoder_architecture")
        one = config.get("multi_query", True) and not new
        num_kv = 1 if one else (config.get("num_kv_heads") or num_q) if new else num_q
    for value in (num_q, num_kv):
        if type(value) is not int or not 1 <= value < 1 << 20:
            raise InputError(
                f"{path}: the rows of query, key and value can only be told apart with "
                "num_attention_heads and num_key_value_heads, positive integers in config.json; "
                f"they are {num_q!r} and {num_kv!r}"
            )
    assert isinstance(num_q, int) and isinstance(num_kv, int)
    return num_q, num_kv
