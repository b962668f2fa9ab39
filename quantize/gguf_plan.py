"""Plan the content of a GGUF file before anything is computed; reject what cannot be written.

A GGUF source keeps its metadata, with the tokenizer; for any other source they are made from its config
and tokenizer. Both are read back here, by Yoke's own reader. Matrices get the forms of the recipe;
vectors and routers are stored in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig, expected_shapes
from models.load import check_names, config_of
from models.tokenizer.from_gguf import gguf_codec
from quantize.gguf_file import header_bytes, num_bytes
from quantize.gguf_keys import architecture_of, check_read_back, metadata_of
from quantize.gguf_recipe import RECIPES, Dimensions, form_of
from quantize.gguf_tensors import GgufTensor, tensors_of
from quantize.gguf_vocab import vocabulary_of
from quantize.plan import refuse_quantized
from weights.checkpoint import Checkpoint
from weights.formats.gguf_names import FACTORS

_QUANTIZATION_VERSION = 2  # of ggml's block forms
# Keys of a source that say how that file was made or split.
_OWN = ("general.file_type", "general.quantization_version", "general.alignment")
_OWN_PREFIXES = ("split.", "quantize.")


@dataclass(frozen=True)
class GgufPlan:
    """`recipe`: a key of RECIPES. `keys`: the file's key-values. `factors`: settings that are tensors.
    `tensors`: those of the model, in order, and `forms`: the form of each, by its name in the file."""

    checkpoint: Checkpoint
    config: ModelConfig
    recipe: str
    keys: Mapping[str, Any]
    factors: Mapping[str, list[float]]
    tensors: tuple[GgufTensor, ...]
    forms: Mapping[str, str]

    @property
    def contents(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, form and shape of each tensor in the file, in order."""
        settings = [(name, "F32", (len(values),)) for name, values in self.factors.items()]
        return [*settings, *((each.name, self.forms[each.name], each.shape) for each in self.tensors)]

    @property
    def total_bytes(self) -> int:
        return sum(num_bytes(form, shape) for _, form, shape in self.contents)

    @property
    def needed_bytes(self) -> int:
        """Bytes on the disk, with a margin for padding and for file systems that round sizes up."""
        return self.total_bytes + header_bytes(self.keys, len(self.contents)) + (1 << 16)


def plan_gguf(checkpoint: Checkpoint, recipe: str) -> GgufPlan:
    """The plan for a checkpoint. Raises InputError if the source is quantized already (as for folders,
    a GGUF source may be), or if a GGUF file cannot describe the model or its tokenizer."""
    refuse_quantized(checkpoint)
    config, source = config_of(checkpoint), str(checkpoint.path)
    shapes = expected_shapes(config)
    check_names(checkpoint, shapes, config.tie_embeddings)
    factors: dict[str, list[float]] = {}
    if checkpoint.format == "gguf":
        found = checkpoint.config
        gguf_codec(checkpoint.path, found)  # a file without a tokenizer that can be read is refused
        keys = {
            key: found[key]
            for key in found
            if key not in (*_OWN, *FACTORS) and not key.startswith(_OWN_PREFIXES) and found[key] != []
        }
        factors = {name: found[name] for name in FACTORS if name in found}
        architecture = str(keys["general.architecture"])
    else:
        architecture = architecture_of(checkpoint.config, source)
        keys, factors = metadata_of(config, architecture)
        keys["general.name"] = checkpoint.folder.name
        keys |= vocabulary_of(checkpoint, config.vocab_size)
    check_read_back(config, {**keys, **factors}, shapes, source)
    keys["general.file_type"] = RECIPES[recipe].file_type
    keys["general.quantization_version"] = _QUANTIZATION_VERSION
    tensors = tensors_of(architecture, config, shapes, source)
    shared = config.num_kv_heads < config.num_heads
    model = Dimensions(config.num_layers, config.num_experts, shared, config.tie_embeddings)
    forms = {each.name: form_of(each.name, each.shape, RECIPES[recipe], model) for each in tensors}
    return GgufPlan(checkpoint, config, recipe, keys, factors, tuple(tensors), forms)
