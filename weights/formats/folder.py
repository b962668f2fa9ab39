"""Shared code of the formats with a config.json: several files as one checkpoint with a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from base.errors import InputError
from weights.checkpoint import Checkpoint, Entry
from weights.files import read_json
from weights.formats.params import hf_config
from weights.formats.quant_config import is_cache_scale, with_file_beside
from weights.formats.quant_hf import with_quantized
from weights.locate import Source
from weights.names import CanonicalPart, translate
from weights.nested import class_of, is_nested, left_out, text_config, text_weights
from weights.views import present

Absent = dict[str, str]  # stored names of tensors that cannot be read -> the reason


def gather(source: Source, read: Callable[[Path], dict[str, Entry]]) -> tuple[dict[str, Entry], Absent]:
    """The tensors of a source's files, and those left out. With an index, each tensor is read from the
    file that the index gives. Tensors on which index and files disagree are left out, with the reason:
    the model may not need them. Raises InputError for a tensor that is stored twice without an
    index."""
    entries: dict[str, Entry] = {}
    misplaced: Absent = {}
    unlisted: Absent = {}
    for file in source.files:
        for name, entry in read(file).items():
            if not source.holds(file, name):
                if source.places is not None and name not in source.places:
                    unlisted[name] = f"{file} holds it, but {_name_of(source)} does not list it"
                continue
            if name in entries:
                raise InputError(
                    f"{name!r} is stored twice, in {entries[name].file} and in {file}; "
                    "remove the files that do not belong to the model"
                )
            entries[name] = replace(entry, file=file)
    for name, place in (source.places or {}).items():
        if name not in entries:
            assert source.index is not None
            file = source.index.parent / place
            lacks = "does not hold it" if file in source.files else "is missing"
            misplaced[name] = f"{_name_of(source)} says that it is in {file}, which {lacks}"
    return entries, misplaced | unlisted


def _name_of(source: Source) -> str:
    return "the index" if source.index is None else source.index.name


def assemble(
    source: Source,
    stored: Mapping[str, Entry],
    absent: Mapping[str, str] = MappingProxyType({}),
    names: Callable[[str], tuple[CanonicalPart, ...]] = translate,
) -> Checkpoint:
    """The checkpoint of the `stored` tensors of a source, with the config beside it. `absent`: tensors
    that were left out, with the reasons; `names` translates stored names. Raises InputError."""
    if absent and not stored:
        name, reason = next(iter(absent.items()))
        raise InputError(f"{source.path} holds no weights that its index lists: {name!r}: {reason}")
    notes = []
    shapes = {name: entry.shape for name, entry in stored.items()}
    config: Mapping[str, Any] = config_beside(source.folder, shapes)
    if is_nested(config) and names is translate:
        towers = left_out(stored)
        notes.append(f"{source.path}: only its text model is used; left out: {towers or 'nothing'}")
        config, stored = text_config(config), text_weights(stored, source.path)
        absent = text_weights(absent, source.path)
    config, said_by = with_file_beside(config, source.folder, stored)
    scales = [name for name in stored if is_cache_scale(name)]
    stored = {name: entry for name, entry in stored.items() if name not in scales}
    weights = with_quantized(stored, config, said_by, absent)
    parts = {name: entry for name, entry in stored.items() if weights.get(name) is not entry}
    found = present(source, weights, names, config, lambda: _heads(config, source.path))
    reasons: Absent = {}
    for name, reason in absent.items():
        module, _, end = name.rpartition(".")
        # A part of a quantized module is reported under the name of the module's weight.
        whole = name if end in ("weight", "bias") else f"{module}.weight"
        for piece in names(whole):
            reasons.setdefault(piece.name, f"{name}: {reason}")
    if scales:
        notes.append(
            f"{len(scales)} scales of a quantized KV cache, such as {scales[0]!r}, are left out: the "
            "dtype of the cache is that of kv_dtype="
        )
    return replace(found, absent=reasons, notes=tuple(notes), stored=parts)


def config_beside(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The content of `config.json`, or else Meta's `params.json` converted to its keys. Raises
    InputError."""
    params = folder / "params.json"
    if not (folder / "config.json").exists() and params.exists():
        return hf_config(read_json(params), shapes, params)
    return read_json(folder / "config.json")


def _heads(config: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """The numbers of query and KV heads that a config declares. Raises InputError."""
    num_q = config.get("num_attention_heads")
    num_kv = config.get("num_key_value_heads") or num_q
    if class_of(config) == "FalconForCausalLM":
        new = config.get("new_decoder_architecture")
        one = config.get("multi_query", True) and not new
        num_kv = 1 if one else (config.get("num_kv_heads") or num_q) if new else num_q
    for value in (num_q, num_kv):
        if type(value) is not int or not 1 <= value < 1 << 20:
            raise InputError(
                f"{path}: num_attention_heads and num_key_value_heads in config.json must be positive "
                "integers, since they separate the rows of query, key and value; "
                f"they are {num_q!r} and {num_kv!r}"
            )
    assert isinstance(num_q, int) and isinstance(num_kv, int)
    return num_q, num_kv
