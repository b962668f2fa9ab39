"""Families whose weights have other names, are fused, or are experts: there, and back to their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.models import gguf_files
from tests.models.families import save
from tests.reshard.reshard_cases import run
from tests.tensors import same, tensors_of
from weights.open import open_checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "falcon-new",  # grouped rows of several KV heads, biases among them
        "falcon-11b",
        "falcon",
        "gptj",
        "mixtral",
        "qwen3-moe",
        "gemma2",
        "gemma3",
        "phi3",
        "qwen2",
    ],
)
def test_there_and_back(name: str, fast: Path) -> None:
    save(name, fast / "hf")
    original = tensors_of(fast / "hf")
    run("--to", 2, "--verify-forward", fast / "hf", fast / "a")
    assert open_checkpoint(fast / "a").world_size == 2
    run("--to", 1, fast / "a", fast / "back")
    assert same(tensors_of(fast / "back"), original)  # and so are its logits
    assert (fast / "back/config.json").read_bytes() == (fast / "hf/config.json").read_bytes()


def test_falcons_rows_when_kv_heads_are_copied(fast: Path) -> None:
    """Five ranks for two KV heads: the copies are written once, at their places in the groups."""
    save("falcon-11b", fast / "hf")
    run("--to", 5, fast / "hf", fast / "a")
    run("--to", 1, fast / "a", fast / "back")
    assert same(tensors_of(fast / "back"), tensors_of(fast / "hf"))


BLOCKS: dict[str, Any] = {"num_attention_heads": 8, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("mixtral", {}, None),
        ("mixtral", BLOCKS, gguf.GGMLQuantizationType.Q8_0),  # the stack is cut into experts, raw
        ("llama-3.1", {}, None),  # settings that are tensors in the file
        ("phi4-mini", {}, None),
        ("gemma2", {}, None),
        ("falcon-11b", {}, None),
    ],
)
def test_gguf(name: str, changes: dict[str, Any], kind: Any, fast: Path) -> None:
    save(name, fast / "hf", **changes)
    path = gguf_files.write(fast / "hf", fast / "m.gguf", kind=kind)
    run("--to", 2, "--verify", "--verify-forward", path, fast / "a")
    run("--to", 1, "--verify", fast / "a", fast / "b")
    made = open_checkpoint(fast / "b").entries
    for weight, entry in open_checkpoint(path).entries.items():
        assert made[weight].stored_as == entry.stored_as
    if kind is not None:
        assert made["model.layers.0.mlp.experts.3.down_proj.weight"].stored_as == "Q8_0"
