"""Families that Yoke has no code for, run by their plans over 1 to 3 real ranks, against transformers.

The tolerance is that of sums of some hundred float32 products in another order: 1e-4 relative to
logits of the order of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_families import FAMILIES, save

from comm.group import Group
from models.hf import load_hf_model
from tests.targets.hf import run, wanted_of
from weights.safetensors_io import open_safetensors


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 301, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokens: torch.Tensor) -> dict[str, str]:
    """A checkpoint of each family, with transformers' logits for `tokens` beside it."""
    made = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        with torch.no_grad():
            torch.save(save(name, folder)(tokens).logits, folder / "wanted.pt")
        made[name] = str(folder)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_make_the_logits_of_transformers(
    size: int, folders: dict[str, str], run_ranks: Callable
) -> None:
    code, out, err = run_ranks("hf", size, "shm", folders=folders)
    assert code == 0, err
    told = [json.loads(line) for line in out.splitlines()]
    assert [line["name"] for line in told] == list(FAMILIES)
