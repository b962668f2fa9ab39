"""What a checkpoint holds, read from the headers of its files: which weights there are, and which of
them are stored quantized.

It is used before any rank starts, so it is fast and free of torch. The loader opens the same files
with `weights.checkpoint`; a test checks that both give the same answers. What is not here: pickles,
which need a reader of their own; errors in a file; and the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights.files import DAMAGE, read_json
from weights.formats.quant_config import read_quant_config, with_file_beside
from weights.formats.quant_declared import QuantConfig
from weights.formats.quant_layouts import EXPERTS, Stored, expert_names, is_quantized, scheme_of
from weights.locate import MANIFEST, Source, locate
from weights.names import CanonicalPart, translate
from weights.nested import is_nested, text_config, text_weights
from weights.schemes import GGUF_SCHEMES, MXFP4, Scheme

_BLOCK = 8 << 20  # bytes of a weight that are compared at once


@dataclass(frozen=True)
class StoredWeight:
    """How a weight is stored, as in `weights.checkpoint.Entry`: `scheme` is None for a weight that is
    plain or can only be dequantized. `place`: the file, and the first and end byte in it, if known."""

    stored_as: str
    scheme: Scheme | None = None
    place: tuple[Path, int, int] | None = None


@dataclass(frozen=True)
class Outline:
    """`format` is "gguf" if `config` holds the key-values of a GGUF file; otherwise `config` holds the
    keys of a config.json. `weights` have canonical names."""

    format: str
    config: Mapping[str, Any]
    weights: Mapping[str, StoredWeight]


def same_numbers(one: StoredWeight, other: StoredWeight) -> bool:
    """Whether two weights of one shape are stored as the same bytes. False if a place is unknown."""
    if one.place is None or other.place is None or one.stored_as != other.stored_as:
        return False
    (file, start, stop), (other_file, other_start, other_stop) = one.place, other.place
    if stop - start != other_stop - other_start:
        return False
    with file.open("rb") as left, other_file.open("rb") as right:
        left.seek(start)
        right.seek(other_start)
        for done in range(0, stop - start, _BLOCK):
            size = min(_BLOCK, stop - start - done)
            if left.read(size) != right.read(size):
                return False
    return True


def read_outline(path: Path) -> Outline | None:
    """The outline of a model in GGUF, in safetensors with its config.json, or in Yoke's own form. None
    for other checkpoints, and for files that cannot be read: the rank that opens them reports why."""
    try:
        source = locate(path)
        read = {"gguf": _gguf, "yoke": _yoke, "safetensors": _safetensors}.get(source.form)
        return None if read is None else read(source)
    except DAMAGE:
        return None


def _gguf(source: Source) -> Outline:
    from gguf import GGMLQuantizationType

    from weights.formats.gguf_header import architecture_of, num_experts_of
    from weights.formats.gguf_names import FACTORS, naming_of, translate_gguf
    from weights.formats.gguf_split import read_parts

    path, headers = source.path, read_parts(source.files)
    header, tensors = headers[0], [tensor for part in headers for tensor in part.tensors]
    architecture = architecture_of(header, path)
    naming = naming_of(architecture, {tensor.name for tensor in tensors})
    weights: dict[str, StoredWeight] = {}
    for tensor in tensors:
        if tensor.name in FACTORS:
            continue
        shape = tuple(reversed(tensor.dims))
        stacks = "_exps." in tensor.name
        count = num_experts_of(header, path, architecture, tensor.name, shape) if stacks else 0
        kind = GGMLQuantizationType(tensor.kind).name
        stored = StoredWeight(kind, GGUF_SCHEMES.get(kind) if len(shape) in (2, 3) else None)
        _put(weights, translate_gguf(tensor.name, naming, count), stored)
    # The factors that divide rotary frequencies are tensor data, which is not read here: [1.0] stands
    # for them.
    factors = {t.name: lambda: [1.0] for t in tensors if t.name in FACTORS}
    return Outline("gguf", header.values.plus(factors), weights)


def _put(
    weights: dict[str, StoredWeight], pieces: Iterable[CanonicalPart], stored: StoredWeight
) -> None:
    for piece in pieces:
        weights[piece.name] = StoredWeight(stored.stored_as) if piece.plus_one else stored


def _yoke(source: Source) -> Outline:
    manifest = read_json(source.folder / MANIFEST)
    weights: dict[str, StoredWeight] = {}
    stored: dict[str, Stored] = {}
    for tensor in manifest["tensors"]:
        if tensor["axis"] == "stored":  # of a quantized module: as in a Hugging Face folder
            stored[tensor["name"]] = tensor["dtype"], tuple(tensor["shape"])
            continue
        form = tensor["blocks"]["format"] if tensor["blocks"] else tensor["dtype"]
        weights[tensor["name"]] = StoredWeight(form, GGUF_SCHEMES.get(form))
    if stored:
        quantized = read_quant_config(manifest["config"], str(source.folder / MANIFEST))
        weights |= _quantized(stored, quantized)
    return Outline(manifest["source_format"], manifest["config"], weights)


def _safetensors(source: Source) -> Outline:
    from weights.formats.safetensors_header import read_header

    declared = read_json(source.folder / "config.json")
    found: dict[str, Mapping[str, Any]] = {}
    places: dict[str, tuple[Path, int, int]] = {}
    for file in source.files:
        header, start, _ = read_header(file)
        for name in header:
            if source.holds(file, name):
                found[name] = header[name]
                first, last = header[name]["data_offsets"]
                places[name] = (file, start + first, start + last)
    if is_nested(declared):
        found, places = text_weights(found, source.path), text_weights(places, source.path)
    config, said_by = with_file_beside(text_config(declared), source.folder, found)
    quantized = read_quant_config(config, said_by)
    weights: dict[str, StoredWeight] = {}
    for name, about in found.items():
        if name.endswith((".weight", ".bias")):
            _put(weights, translate(name), StoredWeight(about["dtype"], place=places[name]))
    stored = {name: (about["dtype"], tuple(about["shape"])) for name, about in found.items()}
    return Outline("safetensors", config, weights | _quantized(stored, quantized))


def _quantized(stored: Mapping[str, Stored], quantized: QuantConfig | None) -> dict[str, StoredWeight]:
    """The weights of the quantized modules among `stored` tensors, by their dtypes and shapes."""
    weights: dict[str, StoredWeight] = {}
    modules: dict[str, dict[str, Stored]] = {}
    for name, about in stored.items():
        module, _, end = name.rpartition(".")
        modules.setdefault(module, {})[end] = about
    for module, parts in modules.items():
        if quantized is None:
            continue
        if is_quantized(parts):
            weight = StoredWeight(f"{quantized.method} module", scheme_of(quantized, parts))
            _put(weights, translate(f"{module}.weight"), weight)
        if quantized.method == "mxfp4":
            weights |= _experts(module, parts)
    return weights


def _experts(module: str, parts: Mapping[str, Stored]) -> dict[str, StoredWeight]:
    """The weights and biases of gpt-oss's stacked experts in a module, if it has them."""
    found = {}
    for stack in EXPERTS:
        for end, part in (("weight", f"{stack}_blocks"), ("bias", f"{stack}_bias")):
            if part not in parts:
                continue
            dtype, shape = parts[part]
            stored = StoredWeight("mxfp4 module", MXFP4) if end == "weight" else StoredWeight(dtype)
            for _, _, name in expert_names(module, stack, shape[0], end):
                found[name] = stored
    return found
