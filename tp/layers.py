"""Sharded layers: each rank holds a part, and a collective is a visible line in a `forward`.

ColumnLinear shards its outputs and RowLinear its inputs, so a pair of them needs a single all-reduce
(Shoeybi et al., Megatron-LM, 2019). Parameters have no gradients: Yoke only runs models.

A linear layer stores either the plain weight or its packed form: quantized weights (`hold_quantized`),
or a bfloat16 one (`hold_packed`). The weights that are fused into one may have different forms, and
plain ones may be among them. An embedding table may be quantized, too.

What is not here: which rows or columns a rank holds (`tp.shard`), and the kernels (`kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comm import ops
from comm.group import Group
from kernels.linear import linear
from kernels.packed import (
    PackedRows,
    clear_rows,
    pack_bf16,
    pack_parts,
    packed_rows,
    prefers_packed,
)
from kernels.quant_cuda import CudaPacked, pack_cuda, quant_linear_cuda
from kernels.quant_linear import Packed, Part, quant_linear
from weights.quant import QuantWeight


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Packing(NamedTuple):
    """How a layer's weight is packed: its parts, and `round_x` (see `kernels.quant_linear`). On a GPU
    `form` is that of `kernels.quant_cuda.CudaPacked`, and there are no parts."""

    parts: tuple[Part, ...]
    round_x: bool = False
    form: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.form[2] if self.form else sum(part.num_rows for part in self.parts)


class ColumnLinear(nn.Module):
    """y = x W^T with this rank's rows of W: [..., in_features] -> [..., sum(parts)], no collective.

    `parts` are the row counts of the weights that are fused into W (query, key and value, or gate and
    up): one matmul instead of several.
    """

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__()
        self.parts = parts
        self.packing: Packing | None = None
        self.weight = _parameter(sum(parts), in_features)
        self.bias = _parameter(sum(parts)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _matmul(self, x)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """`forward(x)`, split into the outputs of the fused weights."""
        return self(x).split(self.parts, dim=-1)


class RowLinear(nn.Module):
    """A partial x W^T with this rank's columns of W: the sum over the ranks is the result.

    [..., local_features] -> [..., out_features]. The caller does the all-reduce, because the same
    collective also adds the residual and normalizes. Only rank 0 has the bias; the others have zeros.
    """

    def __init__(self, local_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.packing: Packing | None = None
        self.weight = _parameter(out_features, local_features)
        self.bias = _parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _matmul(self, x)


class VocabEmbedding(nn.Module):
    """An embedding table that is sharded by token: int [...] -> [..., dim].

    Each rank looks up its own tokens and returns zeros for the others; the sum over the ranks is the
    embedding. Every rank allocates `block` rows; rows past the vocabulary are zero. The rows may be
    quantized (`hold_quantized`), or the head's packed ones (`share_packed`), quantized or not; such
    rows are converted to `dtype` as they are looked up.
    """

    def __init__(self, block: int, start: int, dim: int, group: Group) -> None:
        super().__init__()
        self.block = block
        self.start = start
        self.dim = dim
        self.group = group
        self.dtype = torch.bfloat16
        self.packing: Packing | None = None
        self.weight = _parameter(block, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        data = self._buffers.get("packed_data")
        if data is not None and self.packing is not None:
            table = Packed(data, self.packing.parts)
            part = packed_rows(tokens, table, self.start, self.block, self.dtype)
            return part if self.group.size == 1 else ops.all_reduce(part, self.group)
        if self.group.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.start
        mine = (local >= 0) & (local < self.block)
        rows = F.embedding(local.clamp(0, self.block - 1), self.weight)
        return ops.all_reduce(rows * mine.unsqueeze(-1), self.group)


class LMHead(nn.Module):
    """Logits of a head that is sharded by token: [..., dim] -> [..., vocab_size] on all ranks.

    `weight` may be the embedding's parameter (tied). Every rank contributes `block` logits; those past
    the vocabulary are cut off.
    """

    def __init__(
        self, block: int, vocab_size: int, weight: nn.Parameter, group: Group, bias: bool = False
    ) -> None:
        super().__init__()
        self.packing: Packing | None = None
        self.bias = _parameter(block) if bias else None
        assert weight.shape[0] == block
        self.vocab_size = vocab_size
        self.group = group
        self.weight = weight

    def local(self, x: Tensor) -> Tensor:
        """This rank's logits: [..., dim] -> [..., block], including those past the vocabulary."""
        return _matmul(self, x)

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x)
        if self.group.size == 1:
            return local
        blocks = ops.all_gather(local, self.group)  # [size, ..., block]
        return blocks.movedim(0, -2).flatten(-2)[..., : self.vocab_size]


Linear = ColumnLinear | RowLinear | LMHead


def hold_quantized(
    layer: Linear | VocabEmbedding,
    weights: Sequence[QuantWeight | Tensor],
    device: torch.device | str = "cpu",
    round_prompts: bool = False,
) -> None:
    """Replace a layer's weight by `weights`, this rank's shards of its parts, in packed form: quantized
    ones in their own forms, plain ones in bfloat16. An embedding has one part.

    On a CPU, columns must be whole steps of the kernels (raises InputError). On a GPU there is one
    part, quantized. With `round_prompts`, inputs of many rows may be rounded to int8 (`round_x` in
    `kernels.quant_linear`).
    """
    if torch.device(device).type == "cuda":
        (weight,) = weights
        assert isinstance(weight, QuantWeight)
        on_gpu = pack_cuda(weight.with_rows(lambda each: each.to(device)))
        layer.weight = None  # type: ignore[assignment]
        layer.packing = Packing((), round_prompts, on_gpu.form)
        for name in ("data", "scale", "offset"):
            layer.register_buffer(f"packed_{name}", getattr(on_gpu, name), persistent=False)
        return
    hold(layer, pack_parts(weights), round_prompts)


def hold(layer: Linear | VocabEmbedding, packed: Packed, round_prompts: bool = False) -> None:
    """Replace a layer's weight by a packed one."""
    layer.weight = None  # type: ignore[assignment]
    layer.packing = Packing(packed.parts, round_prompts)
    layer.register_buffer("packed_data", packed.data, persistent=False)


def can_pack(layer: Linear, device: torch.device | str = "cpu") -> bool:
    """Whether packing makes this layer faster: a bfloat16 weight on a CPU that prefers it (AMX)."""
    weight = layer.weight
    if weight is None or weight.dtype != torch.bfloat16 or weight.numel() == 0:
        return False
    return torch.device(device).type == "cpu" and prefers_packed()


def hold_packed(layer: Linear) -> None:
    """Replace a layer's weight by its packed form. On the meta device, that has no data yet: fill it
    through `packed_parts`."""
    hold(layer, pack_bf16(layer.weight))


def packed_parts(layer: Linear, sizes: Sequence[int]) -> list[PackedRows]:
    """Where to write the fused weights of a packed layer; `sizes`: the row count of each. All rows
    after them are set to zero."""
    data = layer._buffers["packed_data"]
    assert data is not None
    clear_rows(data, sum(sizes))
    firsts = accumulate(sizes, initial=0)
    return [PackedRows(data, first, size) for first, size in zip(firsts, sizes, strict=False)]


def share_packed(embed: VocabEmbedding, head: LMHead) -> None:
    """Tie the embedding to the head's packed weight: it reads its rows there and drops its own."""
    embed.weight = None  # type: ignore[assignment]
    embed.packing = head.packing
    embed.register_buffer("packed_data", head._buffers["packed_data"], persistent=False)


def packed_of(layer: Linear) -> Packed | None:
    """A layer's packed weight, or None if the layer has a plain one."""
    data = layer._buffers.get("packed_data")
    if layer.packing is None or data is None or layer.packing.form:
        return None
    return Packed(data, layer.packing.parts)


def _matmul(layer: Linear, x: Tensor) -> Tensor:
    packed = packed_of(layer)
    if layer.packing is None:
        return linear(x, layer.weight, layer.bias)
    if packed is None:
        data, scale, offset = (layer._buffers[f"packed_{name}"] for name in ("data", "scale", "offset"))
        assert data is not None and scale is not None
        return quant_linear_cuda(x, CudaPacked(data, scale, offset, layer.packing.form), layer.bias)
    return quant_linear(x, packed, layer.bias, layer.packing.round_x)
