"""Plan the content of a quantized folder, file by file, before anything is computed; reject what
cannot be quantized.

Norms, biases, routers and the embedding are not quantized; from a source with block formats (GGUF) they
are stored in bfloat16. A tied lm_head stays tied to the embedding, or gets a quantized copy of the
embedding as its own weights, as in a run that rounds weights while loading.

Names are the canonical ones, which for most families are also those of transformers. For families that
fuse projections or name them otherwise (Phi 3, GPT-J, Falcon), and for Meta's files, Yoke can read the
folder, but other programs may not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from base.errors import InputError
from models.config import EMBEDDING, HEAD, ModelConfig, expected_shapes
from models.load import check_names, config_of
from models.quant_rules import Asked, scheme_for
from quantize.compressed import Shapes, quantization_config, stored_shapes
from quantize.small_files import small_files
from reshard.plan import INDEX, SHARD_BYTES, hf_files
from weights.checkpoint import Checkpoint, Entry
from weights.schemes import SCHEMES, Scheme, parse_scheme
from weights.writer import DTYPES, Tensors


@dataclass(frozen=True)
class Plan:
    """`scheme`: the scheme of the layers. `schemes`: the scheme of each quantized weight. `kept`: the
    dtype, in safetensors' spelling, of each weight that is not quantized. `files`: the contents of each
    file, by name; `texts`: the small files. All weights are in the order of the model."""

    checkpoint: Checkpoint
    config: ModelConfig
    scheme: Scheme
    shapes: Mapping[str, tuple[int, ...]]
    schemes: Mapping[str, Scheme]
    kept: Mapping[str, str]
    files: Mapping[str, Tensors]
    texts: Mapping[str, bytes]

    @property
    def needed_bytes(self) -> int:
        """Bytes on the disk, with a margin for file systems that round sizes up."""
        count = len(self.files) + len(self.texts)
        return self.total_bytes + sum(map(len, self.texts.values())) + 8192 * (count + 4)

    @property
    def total_bytes(self) -> int:
        return sum(contents.file_bytes for contents in self.files.values())


def plan_quantize(checkpoint: Checkpoint, asked: Asked, untie: bool = False) -> Plan:
    """The plan for a checkpoint. `untie`: a tied head that should be quantized gets weights of its own;
    otherwise it stays tied. Raises InputError if the source is quantized already, or if the rows of a
    weight are not a multiple of the scheme's group size."""
    refuse_quantized(checkpoint)
    config = config_of(checkpoint)
    shapes = expected_shapes(config)
    check_names(checkpoint, shapes, config.tie_embeddings)
    if untie and config.tie_embeddings and asked.head is not None:
        return plan_quantize(_untied(checkpoint), asked)
    wanted = ((name, scheme_for(name, asked)) for name in shapes)
    schemes = {name: scheme for name, scheme in wanted if scheme is not None}
    grouped = [name for name, scheme in schemes.items() if scheme == asked.layers]
    _check_groups({name: shapes[name][1] for name in grouped}, asked)
    kept = {name: _kept_dtype(checkpoint.entries[name]) for name in shapes if name not in schemes}
    stored: Shapes = {}
    for name, shape in shapes.items():
        if name in schemes:
            stored |= stored_shapes(name, shape, schemes[name])
        else:
            stored[name] = (kept[name], shape)
    files = hf_files(stored, SHARD_BYTES)
    routers = [name.removesuffix(".weight") for name in kept if name.endswith(".mlp.gate.weight")]
    about = quantization_config(asked.layers, schemes.get(HEAD), routers)
    texts = small_files(checkpoint, config, about)
    if len(files) > 1:
        texts[INDEX] = _index(files)
    return Plan(checkpoint, config, asked.layers, shapes, schemes, kept, files, texts)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise InputError if a source says that it is quantized. (A GGUF source is used as it is: it may
    be quantized in part, and the command says so.)"""
    found = checkpoint.config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise InputError(
            f"{checkpoint.path} is quantized already (quantization_config, {str(method)[:50]}); "
            "quantize the model that it was made from"
        )


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with an untied head that has the embedding's weights."""
    entries = {**checkpoint.entries, HEAD: checkpoint.entries[EMBEDDING]}
    if checkpoint.format == "gguf":  # its config is derived from its weights
        return replace(checkpoint, entries=entries)
    config = {**checkpoint.config, "tie_word_embeddings": False}
    return replace(checkpoint, entries=entries, config=config)


def _check_groups(columns: Mapping[str, int], asked: Asked) -> None:
    group = asked.layers.group_size
    for name, k in columns.items():
        if group and k % group:
            fitting = [
                other
                for other in SCHEMES
                if not any(k % (parse_scheme(other).group_size or 1) for k in columns.values())
            ]
            raise InputError(
                f"{asked.words}: {name} has {k} columns, which is not a multiple of {group}; schemes "
                f"that fit all weights of this model: {', '.join(fitting)}"
            )


def _kept_dtype(entry: Entry) -> str:
    """Plain floats keep their dtype; blocks, and random numbers, become bfloat16."""
    plain = entry.block == 1 and entry.stored_as in DTYPES
    return entry.stored_as if plain and DTYPES[entry.stored_as].is_floating_point else "BF16"


def _index(files: Mapping[str, Tensors]) -> bytes:
    places = {name: file for file, contents in files.items() for name in contents.shapes}
    total = sum(contents.data_bytes for contents in files.values())
    index: dict[str, Any] = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(places.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()
