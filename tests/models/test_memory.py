"""A rank never holds more than its own part: measured on a checkpoint of more than a gigabyte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.config import ModelConfig, expected_shapes
from tests.running import RunRanks

CONFIG = ModelConfig(2048, 8, 32, 8, 64, 8192, 32000, 2048)
HF = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": CONFIG.dim,
    "num_hidden_layers": CONFIG.num_layers,
    "num_attention_heads": CONFIG.num_heads,
    "num_key_value_heads": CONFIG.num_kv_heads,
    "intermediate_size": CONFIG.ffn_dim,
    "vocab_size": CONFIG.vocab_size,
    "max_position_embeddings": CONFIG.max_seq_len,
}
# In a process of its own, so that this one does not grow by a gigabyte.
MAKE = """
import json, sys
import torch
from safetensors.torch import save_file
folder, shapes = sys.argv[1], json.loads(sys.argv[2])
names = list(shapes)
files = {}
for i in range(0, len(names), 16):
    part = names[i : i + 16]
    file = f"model-{i:05d}.safetensors"
    save_file({n: torch.full(shapes[n], 0.01, dtype=torch.bfloat16) for n in part}, f"{folder}/{file}")
    files.update({n: file for n in part})
json.dump({"weight_map": files}, open(f"{folder}/model.safetensors.index.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gigabyte")
    (path / "config.json").write_text(json.dumps(HF))
    shapes = json.dumps(expected_shapes(CONFIG))
    subprocess.run([sys.executable, "-c", MAKE, str(path), shapes], check=True)
    assert sum(file.stat().st_size for file in path.iterdir()) > 1 << 30
    return path


@pytest.mark.parametrize("size", [1, 2, 3])
def test_peak_memory_is_the_ranks_own_part(folder: Path, size: int, run_ranks: RunRanks) -> None:
    code, out, err = run_ranks("memory", size, "gloo", folder=str(folder))
    assert code == 0, err
    lines = [json.loads(line[line.index("{") :]) for line in out.splitlines()]
    assert len(lines) == size
    for line in lines:
        assert line["peak"] <= 1.15 * line["shard"] + 600e6, line
    if size > 1:
        assert max(line["shard"] for line in lines) < 0.62e9 * 2 / size * 1.4
