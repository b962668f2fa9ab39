"""Which tensors a GGUF file of a model has, and how the model's weights become them.

It is the inverse of reading: a name of the file is taken if `weights.formats.gguf_names` translates it
to weights that the model has, and its weights are stacked, reordered and shifted as that translation
says they were. So the reader restores exactly what was written.

What is not here: the forms (quantize.gguf_recipe), and the numbers in them (quantize.gguf_search).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from base.errors import InputError
from models.config import ModelConfig
from quantize.walk import whole
from weights.checkpoint import Checkpoint
from weights.formats.gguf_names import Naming, naming_of, translate_gguf
from weights.names import CanonicalPart

_SHARED = ("token_embd", "output_norm", "output")
_TWO_NORMS = "blk.0.attn_norm_2.weight"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, its shape (slowest dimension first), and the weights that it consists of:
    their rows one after the other, or a stack of them."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[CanonicalPart, ...]


def tensors_of(
    architecture: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: str
) -> list[GgufTensor]:
    """The tensors of a model with weights of these `shapes`, by canonical name, in the order of the
    model. Raises InputError for a weight that such a file has no name for."""
    naming = naming_of(architecture, {_TWO_NORMS} if config.two_norms else ())
    found: list[GgufTensor] = []
    covered: set[str] = set()
    for name in _names(naming, config):
        parts = translate_gguf(name, naming, config.num_experts)
        names = {part.name for part in parts}
        if not parts or not names <= shapes.keys() or names & covered:
            continue
        covered |= names
        found.append(GgufTensor(name, _shape(parts, shapes), parts))
    left = sorted(shapes.keys() - covered)
    if left:
        raise InputError(
            f"{source}: GGUF's architecture {architecture!r} has no name for {left[0]} and "
            f"{len(left) - 1} other weights; write a folder instead: quant=int8 or quant=int4-g32"
        )
    return found


def _names(naming: Naming, config: ModelConfig) -> Iterator[str]:
    """All names that the file may have: a name that fuses several weights before those of each."""
    first, *last = _SHARED
    yield f"{first}.weight"
    inner = [name for name in naming.fused if name not in naming.names]
    inner = [*inner, *(name for name in naming.fused if name in naming.names), *naming.names]
    for i in range(config.num_layers):
        for name in dict.fromkeys(inner):
            for kind in ("weight", "bias"):
                yield f"blk.{i}.{name}.{kind}"
                if config.has_experts(i):
                    yield f"blk.{i}.{name}_exps.{kind}"
    for name in last:
        yield from (f"{name}.weight", f"{name}.bias")


def _shape(parts: tuple[CanonicalPart, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    own = [shapes[part.name] for part in parts]
    if parts[0].expert is not None:
        return (len(own), *own[0])
    return (sum(shape[0] for shape in own), *own[0][1:])


def stored_values(checkpoint: Checkpoint, part: CanonicalPart, config: ModelConfig) -> Tensor:
    """The numbers of a weight as the file has them, in the checkpoint's dtype or float32; it may be a
    view of the checkpoint's file."""
    weight = whole(checkpoint, part.name)
    if part.plus_one:
        return weight.float() + 1
    if not part.interleaved:
        return weight
    heads = config.num_heads if ".q_proj." in part.name else config.num_kv_heads
    halves = weight.reshape(heads, 2, config.head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
