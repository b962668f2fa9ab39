"""Checkpoints as a whole: the tensors of a folder or a checkpoint, and whether two have the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from weights.checkpoint import Checkpoint


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Those of all its safetensors files, as they are stored."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def whole(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights by their canonical names, dequantized."""
    return {
        name: entry.read(tuple(slice(0, size) for size in entry.shape))
        for name, entry in checkpoint.entries.items()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether both hold the same bytes under the same names."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(_bytes(left[name]), _bytes(right[name]))
        for name in left
    )


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
